"""The vocabulary that every room shares: what the engine is asked and what it answers. No text, no JSON, no HTTP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.shared_array import SharedArray
from dashinfer_vlm.stages import Span

if TYPE_CHECKING:  # every process speaks this vocabulary, and those without a model do without torch
    import numpy as np
    import torch

Grid = tuple[int, int, int]
"""Frames (pairs of frames), rows and columns of an item, counted in patches before merging."""

ItemKind = Literal["image", "video"]
_MOST = 2**31 - 1
"""Of whole numbers: none of them means more when it is larger, and larger ones do not fit the arrays and messages."""
_SEEDS = 2**63
MAX_LISTED_TOKENS = 1024
"""Of `logit_bias` and of `stop_token_ids`."""
MAX_STOP_SEQUENCES = 64
MAX_STOP_SEQUENCE_TOKENS = 1024
MAX_BAD_WORDS = 1000
"""As token sequences; vLLM's limit."""
MAX_LOGPROBS = 20
FinishReason = Literal["stop", "length", "abort", "error"]


GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "calls"]
MAX_GRAMMAR_CHARS = 1 << 17


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer must be, whole: only tokens that lead there are drawn, and it ends when nothing may follow."""

    kind: GrammarKind
    text: str
    """A JSON schema; a regular expression, of the whole answer; a JSON list of strings; a grammar in Lark or GBNF;
    the `Calls` of `engine/grammars/calls.py` as JSON."""
    param: str = "structured_outputs"
    """The request's field that it came in, for what is said about it."""
    thought: tuple[str, str] | None = None
    """Tags of free text that comes first: the second one ends it, and the first, unless it is empty, may begin it."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, *, param: str = "structured_outputs") -> Grammar:
        """JSON that the schema, an object or its text, describes."""
        return cls("json_schema", schema if isinstance(schema, str) else _json(schema), param)

    @classmethod
    def json_object(cls, *, param: str = "structured_outputs") -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, param=param)

    @classmethod
    def choices(cls, texts: Iterable[str], *, param: str = "structured_outputs") -> Grammar:
        """Exactly one of the texts."""
        return cls("choice", _json(list(texts)), param)

    def validate(self) -> None:
        """Raise InvalidRequestError for one that is not worth looking at."""
        if not self.text:
            raise InvalidRequestError(f"{self.param} is empty", param=self.param)
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                f"{self.param} has {len(self.text)} characters; the limit is {MAX_GRAMMAR_CHARS}", param=self.param
            )


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen.

    `validate()` raises InvalidRequestError with the offending field and value; the defaults are those of the OpenAI
    API. The penalties follow their usual definitions: repetition divides positive and multiplies negative logits of
    every token in prompt or output (Keskar et al. 2019); presence and frequency subtract from tokens of the output
    (OpenAI API reference).
    """

    max_tokens: int | None = None
    """Output tokens at most; None runs to the end of the model's context."""
    min_tokens: int = 0
    """No stop token, stop sequence or end-of-sequence before this many output tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    """0 is off; n forbids a second occurrence of any n-gram of prompt and output."""
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that the output never has: the last id of one is not chosen behind its others."""
    seed: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    """When there are any, no other token is chosen; one that ends the answer is among them, or its length ends it."""
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Stop when the output ends with one of these id sequences."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. n: the chosen token's log probability and those of the n likeliest (0 to 20)."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, but for its first. No prefix that was computed before is used then."""
    grammar: Grammar | None = None
    """It goes before `min_tokens` and `ignore_eos`: the answer ends where nothing may follow."""

    def validate(self, vocab_size: int, max_tokens_name: str = "max_tokens") -> None:
        """Raise InvalidRequestError unless every field is finite and in range for a vocabulary of `vocab_size`.

        `max_tokens_name` is what the caller calls `max_tokens`.
        """
        limits: tuple[tuple[str, float | None, float, float], ...] = (
            (max_tokens_name, self.max_tokens, 1, _MOST),
            ("min_tokens", self.min_tokens, 0, _MOST),
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k, 0, _MOST),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 100),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, _MOST),
            ("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
        )
        for name, value, low, high in limits:
            if value is not None and not low <= value <= high:  # also false for NaN
                raise InvalidRequestError(f"{name} is {value}; it must be from {low} to {high}", param=name)
        for name, value in (("temperature", self.temperature), ("repetition_penalty", self.repetition_penalty)):
            if not math.isfinite(value):
                raise InvalidRequestError(f"{name} is {value}; it must be finite", param=name)
        if self.seed is not None and not -_SEEDS <= self.seed < _SEEDS:
            raise InvalidRequestError(f"seed is {self.seed}; it must fit 64 bits", param="seed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, more than {max_tokens_name} {self.max_tokens}", param="min_tokens"
            )
        self._validate_lists(vocab_size)
        if self.grammar is not None:
            self.grammar.validate()

    def _validate_lists(self, vocab_size: int) -> None:
        lengths: tuple[tuple[str, str, int, int], ...] = (
            ("logit_bias", "tokens", len(self.logit_bias), MAX_LISTED_TOKENS),
            ("stop_token_ids", "tokens", len(self.stop_token_ids), MAX_LISTED_TOKENS),
            ("bad_words", "token sequences", len(self.bad_words), MAX_BAD_WORDS),
            ("stop_sequences", "sequences", len(self.stop_sequences), MAX_STOP_SEQUENCES),
            (
                "stop_sequences",
                "tokens in one of them",
                max(map(len, self.stop_sequences), default=0),
                MAX_STOP_SEQUENCE_TOKENS,
            ),
        )
        for name, what, length, most in lengths:
            if length > most:
                raise InvalidRequestError(f"{name} has {length} {what}; the limit is {most}", param=name)
        for token, bias in self.logit_bias.items():
            if not (0 <= token < vocab_size and -100 <= bias <= 100):
                raise InvalidRequestError(
                    f"logit_bias of token {token} is {bias}; ids are below {vocab_size}, biases from -100 to 100",
                    param="logit_bias",
                )
        for token in self.allowed_token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"allowed_token_ids has {token}; ids are from 0 to {vocab_size - 1}", param="allowed_token_ids"
                )
        for token in (*self.stop_token_ids, *(t for s in self.stop_sequences for t in s)):
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids has {token}; ids are from 0 to {vocab_size - 1}", param="stop_token_ids"
                )
        if not all(0 <= token < vocab_size for word in self.bad_words for token in word):
            raise InvalidRequestError(f"bad_words has a token that is not below {vocab_size}", param="bad_words")
        if not all(self.bad_words):
            raise InvalidRequestError("one of bad_words has no token", param="bad_words")
        if any(not s for s in self.stop_sequences):
            raise InvalidRequestError("a stop sequence is empty", param="stop_sequences")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A run of placeholder tokens of a request and what stands behind it: an image, a video, or a part of a video that
    is written as several runs. Parts share features and `content_hash`, and follow each other row by row.

    Exactly one of `patches` (the encoder turns them into embeddings) and `embedding` (ready made) is given.
    """

    kind: ItemKind
    start: int
    """Index in the prompt of the first placeholder token."""
    num_tokens: int
    content_hash: bytes
    """32 bytes: identity of decoded pixels + processor settings (or of the embedding); never a URL."""
    grid: Grid | None = None
    """None only for a ready-made embedding that is not laid out on a grid."""
    patches: np.ndarray | torch.Tensor | SharedArray | None = None
    """The item's features; of images and videos uint8 [P, patch_dim], rows in the processor's merge order (see
    processors/qwen.py). The engine's loop maps a shared array before the engine sees it."""
    embedding: torch.Tensor | SharedArray | None = None
    """float [num_tokens, embedding size]; mapped like `patches`."""
    first_row: int = 0
    """Row of the encoder's output that the first placeholder stands for."""
    encoded_rows: int | None = None
    """Rows of the encoder's output; None: `num_tokens`."""
    seconds_per_grid: float = 1.0
    """Seconds of video per temporal grid step; scales Qwen2.5-VL's temporal axis."""

    @property
    def end(self) -> int:
        """Index in the prompt behind the last placeholder token."""
        return self.start + self.num_tokens

    @property
    def num_rows(self) -> int:
        """Rows of the encoder's output, of which this run may be a part."""
        return self.num_tokens if self.encoded_rows is None else self.encoded_rows

    @property
    def is_last_part(self) -> bool:
        """Whether no later run needs the encoder's output."""
        return self.first_row + self.num_tokens == self.num_rows

    @property
    def work(self) -> int:
        """What encoding it costs, in rows of its features; 0 for a ready-made embedding."""
        return 0 if self.patches is None else int(self.patches.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked: the whole prompt with its placeholders expanded, its items in order, its sampling."""

    id: str
    prompt_ids: list[int]
    """One id per position; an item's run holds a placeholder id that may lie outside the vocabulary."""
    params: SamplingParams = SamplingParams()
    items: tuple[Item, ...] = ()
    positions: torch.Tensor | None = None
    """int [3, S]: explicit M-RoPE positions; None: computed from the grids."""
    cache_salt: str = ""
    """Prefixes are shared only with requests that have the same one."""
    priority: int = 0
    """Of the requests that wait, those with the lowest number run first; of those that run, they are preempted last."""
    tenant: str = ""
    """Whose it is: those of a busy engine take turns."""
    weight: float = 1.0
    """How much of it the tenant gets beside others."""
    wants_vector: bool = False
    """It is answered with one vector, and no token is chosen."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one chosen token, and of the likeliest alternatives, best first (before the penalties)."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest token."""
    top: tuple[tuple[int, float], ...] = ()


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a sequence ended; each accepted request gets exactly one."""

    reason: FinishReason
    stop_token: int | None = None
    """The token that ended it (an end-of-sequence or stop token; it is not among the output tokens)."""
    message: str | None = None
    """For `error`: what went wrong, fit for the client's eyes."""
    impossible: bool = False
    """For `error`: whether the request asks for what cannot be, however often."""


class Output(msgspec.Struct, frozen=True, array_like=True):
    """News of one request after a step; the one with `finish` is its last."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of `token_ids` when asked for, else empty."""
    finish: Finish | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """When asked for: of the prompt's next tokens that were not told before; all come before the first output token."""
    spans: tuple[Span, ...] = ()
    """Stages that have ended since the output before."""
    vector: bytes = b""
    """When asked for, in the last output: the final state of the prompt's last token, normed as the model norms it.
    float32, little endian, [hidden size]. Of a model that scores pairs [1]: the logit of yes against no."""
