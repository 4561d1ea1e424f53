"""The answers of the OpenAI API as typed structs; msgspec writes them, which is what a stream's speed needs."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec

from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.frontend.deltas import Delta, Usage
from dashinfer_vlm.frontend.messages import ToolCall
from dashinfer_vlm.frontend.pieces import CallArguments, CallStart, Piece, ReasoningPiece, TextPiece
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import TokenLogprob

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; the value that vLLM's users know."""


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class UsageReply(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens

    @classmethod
    def of(cls, usage: Usage) -> UsageReply:
        prompt, output = usage.num_prompt_tokens, usage.num_output_tokens
        details = CachedTokens(usage.num_cached_tokens), ReasoningTokens(usage.num_reasoning_tokens)
        return cls(prompt, output, prompt + output, *details)


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[msgspec.Raw]
    """`ChatLogprob` rows, written one by one: the rows of a whole answer at once would stop every other request."""
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[msgspec.Raw]
    """Objects from token to log probability."""
    text_offset: list[int]


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCallReply(msgspec.Struct, frozen=True):
    id: str
    function: FunctionCall
    type: str = "function"

    @classmethod
    def of(cls, call: ToolCall) -> ToolCallReply:
        """`call` is one of an answer, and has its id."""
        assert call.id is not None, call
        return cls(call.id, FunctionCall(call.name, call.arguments))


class AnswerMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallReply] | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, answer: Answer, *, reasoning: bool) -> AnswerMessage:
        """The content is null where the answer is calls alone."""
        return cls(
            "assistant",
            None if answer.tool_calls and not answer.text else answer.text,
            reasoning_content=answer.reasoning if answer.reasoning and reasoning else msgspec.UNSET,
            tool_calls=[ToolCallReply.of(call) for call in answer.tool_calls] or msgspec.UNSET,
        )


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The beginning of a call has all fields, what follows of its arguments the first and the last."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionDelta = FunctionDelta("")

    def with_arguments(self, text: str) -> ToolCallDelta:
        """The same with more of its arguments."""
        return msgspec.structs.replace(
            self, function=msgspec.structs.replace(self.function, arguments=self.function.arguments + text)
        )


class DeltaMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None

    @classmethod
    def of(cls, pieces: Sequence[Piece], *, reasoning: bool) -> DeltaMessage:
        """All that is new in an answer; the content is empty where that is no text. A call has one entry: clients take
        the entries of one event for as many calls."""
        if len(pieces) == 1 and isinstance(pieces[0], TextPiece):  # nearly all are
            return cls(content=pieces[0].text)
        texts: list[str] = []
        thoughts: list[str] = []
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            match piece:
                case TextPiece(text):
                    texts.append(text)
                case ReasoningPiece(text):
                    thoughts.append(text)
                case CallStart(index, id, name):
                    calls[index] = ToolCallDelta(index, id, "function", FunctionDelta("", name))
                case CallArguments(index, text):
                    calls[index] = calls.get(index, ToolCallDelta(index)).with_arguments(text)
        return cls(
            content="".join(texts),
            reasoning_content=("".join(thoughts) or None) if reasoning else None,
            tool_calls=list(calls.values()) or None,
        )


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[msgspec.Raw | None]
"""Null for the first token, then objects from ids to `PromptLogprob`: of the prompt's token, then of the likeliest."""


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    """What ended the answer is among them."""


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    """In a stream, of the choice's first event."""
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class ChatReply(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    system_fingerprint: str
    object: str = "chat.completion"
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class TextReply(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageReply
    system_fingerprint: str
    object: str = "text_completion"


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a stream; `usage` is absent unless it was asked for, and then null where it is not told yet."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageReply | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    """In the first event of each choice."""
    object: str = "chat.completion.chunk"


class TextChunk(msgspec.Struct, frozen=True):
    """The same of text completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageReply | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"


@dataclass(frozen=True, slots=True)
class Head:
    """What all events of one answer repeat."""

    id: str
    created: int
    model: str
    fingerprint: str
    """Changes whenever the same request with the same seed may be answered otherwise."""

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Head:
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, fingerprint)


@dataclass(frozen=True, slots=True)
class UsageEvents:
    """Which events of a stream tell the tokens so far: none, one after the last, or every one as well."""

    last: bool
    every: bool

    def told(self, usage: Callable[[], Usage], *, is_last: bool) -> UsageReply | msgspec.UnsetType | None:
        """The `usage` of one event."""
        if not self.last:
            return msgspec.UNSET
        return UsageReply.of(usage()) if is_last or self.every else None


def chat_logprobs(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    return ChatLogprobs([_raw(_chat_logprob(logprob, tokenizer)) for logprob in logprobs])


def text_logprobs(logprobs: Iterable[TokenLogprob], tokenizer: Tokenizer, offset: int) -> TextLogprobs:
    """`offset` is the length of the text before these tokens."""
    rows = list(logprobs)
    tokens = [_text(row.token_id, tokenizer) for row in rows]
    offsets = list(accumulate(map(len, tokens[:-1]), initial=offset))[: len(tokens)]
    top = [_raw({_text(t, tokenizer): _finite(p) for t, p in row.top}) for row in rows]
    return TextLogprobs(tokens, [_finite(row.logprob) for row in rows], top, offsets)


@dataclass(frozen=True, slots=True)
class Extras:
    """What vLLM's users may ask to be told beside the text; what was not asked for is unset."""

    token_ids: bool = False
    prompt_logprobs: bool = False

    def ids(self, ids: tuple[int, ...]) -> list[int] | msgspec.UnsetType:
        """`ids`, where they are to be told."""
        return list(ids) if self.token_ids else msgspec.UNSET

    def prompt_ids(self, news: Answer | Delta) -> list[int] | msgspec.UnsetType:
        return list(news.prompt_ids) if self.token_ids and news.prompt_ids else msgspec.UNSET

    def prompt_rows(self, answer: Answer, tokenizer: Tokenizer) -> PromptLogprobs | msgspec.UnsetType:
        if not self.prompt_logprobs:
            return msgspec.UNSET
        return [None, *(_raw(_prompt_logprob(row, tokenizer)) for row in answer.prompt_logprobs)]


NO_EXTRAS = Extras()


def _prompt_logprob(row: TokenLogprob, tokenizer: Tokenizer) -> dict[str, PromptLogprob]:
    ranked = [(row.token_id, row.logprob, row.rank), *((t, p, i) for i, (t, p) in enumerate(row.top, 1))]
    return {str(t): PromptLogprob(_finite(p), rank, _text(t, tokenizer)) for t, p, rank in ranked}


def _chat_logprob(row: TokenLogprob, tokenizer: Tokenizer) -> ChatLogprob:
    top = [
        TopLogprob(_text(token, tokenizer), _finite(logprob), list(tokenizer.token_bytes(token)))
        for token, logprob in row.top
    ]
    return ChatLogprob(
        _text(row.token_id, tokenizer), _finite(row.logprob), list(tokenizer.token_bytes(row.token_id)), top
    )


def _raw(value: msgspec.Struct | dict[str, float] | dict[str, PromptLogprob]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode((token,), skip_special=False)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
