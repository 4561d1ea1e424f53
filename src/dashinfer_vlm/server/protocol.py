"""The request bodies of the OpenAI API, with the extensions that users of vLLM and DashInfer send.

A field is in one of three lists: it works; it has no effect here by its nature (`user`, `metadata`, ...) and is
accepted; or it is known and unsupported, and then any value but "not used" is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Discriminator, Tag

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.conversation import MessageBody, ProcessorBody, read_conversation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.schema import Body, Whole, Wholes, no_effect, only
from dashinfer_vlm.frontend.structured import StructuredBody
from dashinfer_vlm.frontend.tool_schema import ToolsBody
from dashinfer_vlm.server.replies import Extras, UsageEvents
from dashinfer_vlm.server.sampling import NumLogprobs, SamplingBody


def _nesting(value: Any) -> str | None:
    """Tag of a prompt: text, texts, ids or lists of ids."""
    if isinstance(value, str):
        return ":text"
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], str):
        return ":texts"
    return ":lists" if value and isinstance(value[0], list) else ":list"


Prompts = Annotated[
    Annotated[str, Tag(":text")]
    | Annotated[list[str], Tag(":texts")]
    | Annotated[Wholes, Tag(":list")]
    | Annotated[list[Wholes], Tag(":lists")],
    Discriminator(_nesting),
]


def prompts_of(sent: Prompts, param: str) -> list[str | list[int]]:
    """Each by itself; raises InvalidRequestError for none."""
    if isinstance(sent, str):
        return [sent]
    if not sent:
        raise InvalidRequestError(f"{param} is an empty list", param=param)
    if isinstance(sent[0], int):
        return [[i for i in sent if isinstance(i, int)]]
    return [prompt for prompt in sent if not isinstance(prompt, int)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, no_effect] = None
    """OpenAI pads chunks against eavesdroppers when true; the padding is optional and absent here."""
    continuous_usage_stats: bool | None = None
    """Every event tells the tokens so far; as in vLLM, only beside `include_usage`."""


class GenerationBody(SamplingBody, StructuredBody):
    """What chat and text completions share."""

    n: Whole | None = None
    max_tokens: Whole | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Whole | None = None
    return_token_ids: bool | None = None

    # no effect by their nature
    add_special_tokens: Annotated[bool | None, no_effect] = None
    """These tokenizers add none of their own to a text."""
    spaces_between_special_tokens: Annotated[bool | None, no_effect] = None
    """Byte-level tokens are joined as they are."""

    # known, not served
    best_of: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1)] = None
    detokenize: Annotated[Any, only(True)] = None
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None
    guided_decoding_backend: Annotated[Any, only()] = None
    guided_whitespace_pattern: Annotated[Any, only()] = None
    structural_tag: Annotated[Any, only()] = None

    @property
    def extras(self) -> Extras:
        return Extras(bool(self.return_token_ids), self.prompt_logprobs is not None)

    @property
    def usage_events(self) -> UsageEvents:
        options = self.stream_options or StreamOptions()
        return UsageEvents(last=bool(options.include_usage), every=bool(options.continuous_usage_stats))

    def check_fields(self) -> None:
        """Raise InvalidRequestError for fields that need others, or exclude them."""
        if self.stream_options and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs are not told in a stream", param="prompt_logprobs")

    def _params(
        self, defaults: dict[str, float | int], max_tokens: int | None, logprobs: int | None
    ) -> GenerationParams:
        """`defaults` are the checkpoint's `generation_config.json`."""
        params = self.sampled(defaults, max_tokens=max_tokens, logprobs=logprobs, grammar=self.grammar())
        sampling = msgspec.structs.replace(params.sampling, prompt_logprobs=self.prompt_logprobs)
        return replace(params, sampling=sampling, n=1 if self.n is None else self.n)


class ChatBody(GenerationBody, ToolsBody):
    """`POST /v1/chat/completions`."""

    messages: list[MessageBody]
    max_completion_tokens: Whole | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    include_reasoning: bool | None = None
    """False leaves it out of the answer; it is thought all the same."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # asks to keep the answer; nothing is kept here
    store: Annotated[Any, only(False)] = None
    modalities: Annotated[Any, only(["text"])] = None

    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    audio: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    echo: Annotated[Any, only(False)] = None
    chat_template: Annotated[Any, only()] = None
    documents: Annotated[Any, only([])] = None
    mm_processor_kwargs: ProcessorBody | None = None

    def dialogue(self, bounds: tuple[int, int]) -> Dialogue:
        """`bounds` are the least and most pixels of an image here. Raises InvalidRequestError."""
        tools, choice = self.offered()
        return Dialogue(
            read_conversation(self.messages, bounds, self.mm_processor_kwargs),
            tools=tools,
            choice=choice,
            variables=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
        )

    def params(self, defaults: dict[str, float | int]) -> GenerationParams:
        """Raises InvalidRequestError for fields that contradict each other."""
        self.check_fields()
        limits = {_limit(sent) for sent in (self.max_tokens, self.max_completion_tokens) if sent is not None}
        if len(limits) > 1:
            raise InvalidRequestError(
                f"max_tokens is {self.max_tokens}, max_completion_tokens {self.max_completion_tokens}; "
                "send one of them",
                param="max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        params = self._params(defaults, limits.pop() if limits else None, self._num_logprobs())
        return replace(
            params,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            max_tokens_name="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
        )

    def _num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. Text prompts are plain text; a prompt of ids may hold any id of the vocabulary."""

    prompt: Prompts
    max_tokens: Whole | None = 16
    """OpenAI's default for this route; null runs to the end of the context."""
    logprobs: Whole | None = None

    include_reasoning: Annotated[bool | None, no_effect] = None
    """A continued text is all text."""

    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None

    def prompts(self) -> list[str | list[int]]:
        return prompts_of(self.prompt, "prompt")

    def params(self, defaults: dict[str, float | int]) -> GenerationParams:
        self.check_fields()
        return self._params(defaults, _limit(self.max_tokens), self.logprobs)


def _limit(max_tokens: int | None) -> int | None:
    """Many clients write -1 for "to the end of the context"."""
    return None if max_tokens == -1 else max_tokens
