"""How the tokens of one request are chosen, in the documented keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from allspark.multimedia import MultiMediaInfo
from allspark.status import AsStatus, RefusalError, wrong
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.structured import ResponseFormatBody
from dashinfer_vlm.request import Grammar, SamplingParams

__all__ = ["ASGenerationConfigBuilder"]

_SEED_LIMIT = 2**63


class ASGenerationConfigBuilder:
    """Builds the dict that requests are started with, call by call; every setter returns the builder.

    Keys that are not set keep their neutral value: sampling at temperature 1 from the whole vocabulary, to the end of
    the engine's context or the model's own end-of-sequence token.
    """

    def __init__(
        self, hf_gen_config: Any = None, seed: int | None = None, eos_token_id: int | list[int] | None = None
    ) -> None:
        """`hf_gen_config` is a `transformers.GenerationConfig` or its dict; its known keys are taken over."""
        self._fields: dict[str, Any] = {}
        if hf_gen_config is not None:
            fields = hf_gen_config if isinstance(hf_gen_config, Mapping) else hf_gen_config.to_dict()
            self._fields |= {key: fields[key] for key in _FROM_HUGGING_FACE if fields.get(key) is not None}
        if eos_token_id is not None:
            self._fields["eos_token_id"] = eos_token_id
        if seed is not None:
            self._fields["seed"] = seed

    def update(self, fields: Mapping[str, Any]) -> ASGenerationConfigBuilder:
        """Set keys by name; they are checked when a request is started."""
        self._fields.update(fields)
        return self

    def do_sample(self, flag: bool = True) -> ASGenerationConfigBuilder:
        """Draw tokens at random; else take the likeliest one."""
        return self.update({"do_sample": flag})

    def early_stopping(self, flag: bool = True) -> ASGenerationConfigBuilder:
        """End at an end-of-sequence token; else go on to the length limit."""
        return self.update({"early_stopping": flag})

    def max_length(self, num_tokens: int) -> ASGenerationConfigBuilder:
        """Prompt plus output tokens at most."""
        return self.update({"max_length": num_tokens})

    def min_length(self, num_tokens: int) -> ASGenerationConfigBuilder:
        """No end before this many output tokens."""
        return self.update({"min_length": num_tokens})

    def temperature(self, value: float) -> ASGenerationConfigBuilder:
        """0 takes the likeliest token."""
        return self.update({"temperature": value})

    def top_k(self, value: int) -> ASGenerationConfigBuilder:
        """Draw from the `value` likeliest tokens; 0 is off."""
        return self.update({"top_k": value})

    def top_p(self, value: float) -> ASGenerationConfigBuilder:
        """Draw from the likeliest tokens that together have this probability."""
        return self.update({"top_p": value})

    def repetition_penalty(self, value: float) -> ASGenerationConfigBuilder:
        """Above 1: tokens of prompt and output become less likely."""
        return self.update({"repetition_penalty": value})

    def presence_penalty(self, value: float) -> ASGenerationConfigBuilder:
        """Subtracted from the logit of every token of the output."""
        return self.update({"presence_penalty": value})

    def frequency_penalty(self, value: float) -> ASGenerationConfigBuilder:
        """Subtracted from the logit of a token as often as it is in the output."""
        return self.update({"frequency_penalty": value})

    def no_repeat_ngram_size(self, size: int) -> ASGenerationConfigBuilder:
        """No sequence of this many tokens occurs twice; 0 is off."""
        return self.update({"no_repeat_ngram_size": size})

    def seed(self, value: int) -> ASGenerationConfigBuilder:
        """Equal requests with equal seeds get equal tokens."""
        return self.update({"seed": value})

    def eos_token_id(self, token: int | list[int]) -> ASGenerationConfigBuilder:
        """What ends the output, instead of the model's own end-of-sequence tokens."""
        return self.update({"eos_token_id": token})

    def stop_words_ids(self, sequences: Sequence[Sequence[int]]) -> ASGenerationConfigBuilder:
        """Token sequences that end the output."""
        return self.update({"stop_words_ids": sequences})

    def log_probs(self, enable_logprobs: bool, top_logprobs: int = 0) -> ASGenerationConfigBuilder:
        """Log probabilities of the tokens, and of the `top_logprobs` (0 to 20) likeliest ones."""
        return self.update({"logprobs": enable_logprobs, "top_logprobs": top_logprobs})

    def with_mm_info(self, info: MultiMediaInfo) -> ASGenerationConfigBuilder:
        """Embeddings that stand for placeholder tokens of the prompt."""
        return self.update({"mm_info": info})

    def build(self) -> dict[str, Any]:
        """The configuration as a dict of its own."""
        return dict(self._fields)


def multimedia(config: Mapping[str, Any]) -> MultiMediaInfo | None:
    """The `mm_info` of a configuration."""
    info = config.get("mm_info")
    if info is not None and not isinstance(info, MultiMediaInfo):
        raise wrong(f"mm_info is a {type(info).__name__}; it must be a MultiMediaInfo")
    return info


def sampling_params(config: Mapping[str, Any], num_prompt: int, max_model_len: int, vocab_size: int) -> SamplingParams:
    """The engine's own parameters; raises RefusalError for the first key or value that cannot be."""
    for key in config:
        if key not in _KEYS:
            raise wrong(f"unknown generation key {key!r}; known are {', '.join(_KEYS)}")
    values = {key: _KEYS[key](key, value) for key, value in config.items() if value is not None}
    _check_unsupported(values)
    stops = values.get("stop_words_ids", [])
    eos = values.get("eos_token_id")
    ends = values.get("early_stopping", True)
    suppresses = values.get("suppress_repetition_in_generation", False)
    params = SamplingParams(
        max_tokens=_max_tokens(values.get("max_length"), num_prompt, max_model_len),
        min_tokens=values.get("min_length", 0),
        temperature=values.get("temperature", 1.0) if values.get("do_sample", True) else 0.0,
        top_k=values.get("top_k", 0),
        top_p=values.get("top_p", 1.0),
        # documented as: presence_penalty rather than repetition_penalty
        repetition_penalty=1.0 if suppresses else values.get("repetition_penalty", 1.0),
        presence_penalty=values.get("presence_penalty", 0.0),
        frequency_penalty=values.get("frequency_penalty", 0.0),
        no_repeat_ngram_size=values.get("no_repeat_ngram_size", 0),
        seed=values.get("seed"),
        stop_token_ids=(*(s[0] for s in stops if len(s) == 1), *(eos or [] if ends else [])),
        stop_sequences=tuple(tuple(s) for s in stops if len(s) > 1),
        ignore_eos=not ends or eos is not None,
        logprobs=values.get("top_logprobs", 0) if values.get("logprobs", False) else None,
        grammar=values.get("response_format"),
    )
    try:
        params.validate(vocab_size)
    except InvalidRequestError as error:
        raise wrong(str(error)) from error
    return params


def _max_tokens(max_length: int | None, num_prompt: int, max_model_len: int) -> int:
    if num_prompt >= max_model_len:
        raise RefusalError(
            AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR,
            f"the prompt has {num_prompt} tokens, the engine's max_length is {max_model_len}",
        )
    if max_length is None:
        return max_model_len - num_prompt
    if max_length > max_model_len:
        raise RefusalError(
            AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR,
            f"max_length is {max_length}, the engine's is {max_model_len}; build it with a larger one",
        )
    if max_length <= num_prompt:
        raise RefusalError(
            AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR,
            f"max_length is {max_length}, but the prompt alone has {num_prompt} tokens; it counts both",
        )
    return max_length - num_prompt


def _check_unsupported(values: Mapping[str, Any]) -> None:
    for key, neutral in _ONLY_NEUTRAL.items():
        if values.get(key, neutral) != neutral:
            raise wrong(f"{key} is {values[key]!r}; only {neutral!r} is supported")
    if values.get("lora_name"):
        raise RefusalError(AsStatus.ALLSPARK_LORA_NOT_FOUND, f"no adapter {values['lora_name']!r} is loaded")


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(f"{key} is {value!r}; it must be a whole number")
    if key == "seed" and not -_SEED_LIMIT <= value < _SEED_LIMIT:
        raise wrong(f"seed is {value}; it must fit 64 bits")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(f"{key} is {value!r}; it must be a finite number")
    return float(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(f"{key} is {value!r}; it must be True or False")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(f"{key} is {value!r}; it must be text")
    return value


def _ids(key: str, value: Any) -> list[int]:
    """One id, or a list of them: `generation_config.json` has either."""
    ids = list(value) if isinstance(value, list | tuple) else [value]
    return [_whole(key, i) for i in ids]


def _id_lists(key: str, value: Any) -> list[list[int]]:
    if not isinstance(value, list | tuple) or not all(isinstance(ids, list | tuple) and ids for ids in value):
        raise wrong(f"{key} is {value!r}; it must be a list of lists of token ids")
    return [_ids(key, ids) for ids in value]


def _format(key: str, value: Any) -> Grammar | None:
    """OpenAI's `response_format`; a JSON schema may stand there without a name."""
    if isinstance(value, Mapping) and isinstance(schema := value.get("json_schema"), Mapping):
        value = {**value, "json_schema": {"name": "answer", **schema}}
    try:
        return ResponseFormatBody.model_validate(value).grammar()
    except (ValidationError, InvalidRequestError) as error:
        raise wrong(f"{key} is {value!r}; it must be text, json_object or json_schema as OpenAI has them") from error


def _as_is(key: str, value: Any) -> Any:
    return value


_KEYS: dict[str, Callable[[str, Any], Any]] = {
    "do_sample": _flag,
    "num_beams": _whole,
    "num_return_sequences": _whole,
    "early_stopping": _flag,
    "eos_token_id": _ids,
    "stop_words_ids": _id_lists,
    "seed": _whole,
    "temperature": _number,
    "top_k": _whole,
    "top_p": _number,
    "repetition_penalty": _number,
    "length_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "suppress_repetition_in_generation": _flag,
    "no_repeat_ngram_size": _whole,
    "min_length": _whole,
    "max_length": _whole,
    "logprobs": _flag,
    "top_logprobs": _whole,
    "lora_name": _text,
    "mm_info": _as_is,
    "response_format": _format,
    "uuid": _text,
}
"""Every documented key, and what its value must be."""

_ONLY_NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0}
"""Known keys that have no meaning without beam search."""

_FROM_HUGGING_FACE = (
    "do_sample",
    "eos_token_id",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
)
