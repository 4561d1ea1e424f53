"""The fields that every kind of answer shares, whatever its API: how its tokens are chosen, and what has no effect."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, Tag

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import Body, Whole, Wholes, by_shape, no_effect, only
from dashinfer_vlm.frontend.truncation import Truncation, TruncationSide
from dashinfer_vlm.request import MAX_LOGPROBS, Grammar, SamplingParams

_SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "seed",
    "min_tokens",
    "logit_bias",
)

NumLogprobs = Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)]
TextOrTexts = Annotated[Annotated[str, Tag(":text")] | Annotated[list[str], Tag(":list")], by_shape]


class PromptBody(Body):
    """What may be said of a prompt and of its place among others, whatever is made of it."""

    model: str | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    truncate_prompt_tokens: Whole | None = None
    truncation_side: TruncationSide | None = None
    priority: Whole | None = None
    timeout: float | None = None
    """Seconds; ours, and the header `x-request-timeout` alike."""

    def prompt_truncation(self) -> Truncation | None:
        """Raises InvalidRequestError."""
        if self.truncate_prompt_tokens is not None:
            return Truncation(self.truncate_prompt_tokens, self.truncation_side or "left")
        if self.truncation_side is not None:
            raise InvalidRequestError("truncation_side needs truncate_prompt_tokens", param="truncation_side")
        return None


class SamplingBody(PromptBody):
    """OpenAI's, and the extensions that users of vLLM send."""

    stop: TextOrTexts | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Whole | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    # extensions, named as in vLLM
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: Whole | None = None
    min_tokens: Whole | None = None
    stop_token_ids: Wholes | None = None
    allowed_token_ids: Wholes | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[str] | None = None

    # no effect by their nature
    user: Annotated[str | None, no_effect] = None
    metadata: Annotated[dict[str, Any] | None, no_effect] = None
    service_tier: Annotated[str | None, no_effect] = None
    safety_identifier: Annotated[str | None, no_effect] = None
    prompt_cache_key: Annotated[str | None, no_effect] = None
    prompt_cache_retention: Annotated[str | None, no_effect] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, no_effect] = None
    request_id: Annotated[str | None, no_effect] = None

    # known, not served
    logits_processors: Annotated[Any, only([])] = None
    kv_transfer_params: Annotated[Any, only({})] = None
    vllm_xargs: Annotated[Any, only({})] = None

    def sampled(
        self,
        defaults: dict[str, float | int],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None,
    ) -> GenerationParams:
        """`defaults` are the checkpoint's `generation_config.json`, as in vLLM; what the request says goes first.

        Raises InvalidRequestError.
        """
        sent = {name: value for name in _SAMPLED if (value := getattr(self, name)) is not None}
        fields: dict[str, Any] = {**defaults, **sent}
        if fields.get("top_k") == -1:  # vLLM's way to say "off"
            fields["top_k"] = 0
        sampling = SamplingParams(
            **fields,
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            grammar=grammar,
        )
        return GenerationParams(
            sampling=sampling,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            cache_salt=self.cache_salt or "",
            bad_words=tuple(self.bad_words or ()),
            truncation=self.prompt_truncation(),
            priority=self.priority or 0,
            timeout_s=self.timeout,
        )
