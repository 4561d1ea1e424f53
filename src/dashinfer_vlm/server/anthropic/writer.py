"""Answers written in the form of Anthropic's Messages API, whole or as its events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from dashinfer_vlm.frontend.answers import Answer
from dashinfer_vlm.frontend.deltas import Delta, EndReason, Usage
from dashinfer_vlm.frontend.messages import ToolCall
from dashinfer_vlm.frontend.pieces import CallArguments, CallStart, Piece, ReasoningPiece, TextPiece
from dashinfer_vlm.server.anthropic.replies import (
    NO_SIGNATURE,
    Block,
    BlockDelta,
    BlockNews,
    BlockStart,
    BlockStop,
    InputJsonDelta,
    MessageNews,
    MessageReply,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    SignatureDelta,
    StopDelta,
    StopReason,
    TextBlock,
    TextBlockDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
    tool_use_id,
)
from dashinfer_vlm.server.errors import reply_to
from dashinfer_vlm.server.respond import Form
from dashinfer_vlm.server.stream import named

_QUIET_S = 5.0
"""A client hears at least a ping in this time while tokens come whose text is held back."""
_NO_INPUT = msgspec.Raw(b"{}")


class MessageWriter:
    """One answer."""

    def __init__(self, model: str, *, max_tokens: int, thoughts: bool) -> None:
        """`max_tokens` is what the request asked for, `thoughts` whether they are told."""
        self._id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._max_tokens = max_tokens
        self._thoughts = thoughts
        self._begun = False
        self._kind: type[Piece] | None = None
        """What the open block holds."""
        self._index = -1
        """Of the newest block."""
        self._told_s = 0.0
        self._end: Delta | None = None

    def whole(self, answers: Sequence[Answer], usage: Usage) -> MessageReply:
        (answer,) = answers
        blocks: list[Block] = []
        if answer.reasoning and self._thoughts:
            blocks.append(ThinkingBlock(answer.reasoning, NO_SIGNATURE))
        if answer.text:
            blocks.append(TextBlock(answer.text))
        blocks += [ToolUseBlock.of(call) for call in answer.tool_calls if _is_whole(call)]
        return self._message(blocks, usage, *self._stop(answer.finish_reason, answer.stop, usage))

    def news(self, delta: Delta, usage: Callable[[], Usage]) -> list[msgspec.Struct]:
        """The message first, then what each step brought, block by block."""
        events: list[msgspec.Struct] = []
        if not self._begun:
            self._begun = True
            events += [MessageStart(self._message([], usage(), None, None)), Ping()]
        for piece in delta.pieces:
            events += self._told(piece)
        if delta.finish_reason:
            events += self._close_block()
            self._end = delta
        now_s = time.monotonic()
        if not events and now_s - self._told_s > _QUIET_S:
            events.append(Ping())
        if events:
            self._told_s = now_s
        return events

    def last(self, usage: Usage) -> list[msgspec.Struct]:
        assert self._end is not None
        assert self._end.finish_reason is not None
        reason, sequence = self._stop(self._end.finish_reason, self._end.stop, usage)
        return [MessageNews(StopDelta(reason, sequence), MessageUsage.of(usage)), MessageStop()]

    def _told(self, piece: Piece) -> list[msgspec.Struct]:
        match piece:
            case TextPiece(text):
                return self._in_block(TextPiece, TextBlock(""), TextBlockDelta(text))
            case ReasoningPiece(text):
                return (
                    self._in_block(ReasoningPiece, ThinkingBlock("", ""), ThinkingDelta(text)) if self._thoughts else []
                )
            case CallStart(_, id, name):
                return [
                    *self._close_block(),
                    *self._open_block(CallStart, ToolUseBlock(tool_use_id(id), name, _NO_INPUT)),
                ]
            case CallArguments(_, text):
                return [BlockNews(self._index, InputJsonDelta(text))]

    def _in_block(self, kind: type[Piece], block: Block, delta: BlockDelta) -> list[msgspec.Struct]:
        """`delta` in the open block if it is of this `kind`, else in a new one."""
        begin = [] if self._kind is kind else [*self._close_block(), *self._open_block(kind, block)]
        return [*begin, BlockNews(self._index, delta)]

    def _open_block(self, kind: type[Piece], block: Block) -> list[msgspec.Struct]:
        self._kind = kind
        self._index += 1
        return [BlockStart(self._index, block)]

    def _close_block(self) -> list[msgspec.Struct]:
        kind, self._kind = self._kind, None
        if kind is None:
            return []
        signature = [BlockNews(self._index, SignatureDelta(NO_SIGNATURE))] if kind is ReasoningPiece else []
        return [*signature, BlockStop(self._index)]

    def _message(
        self, blocks: list[Block], usage: Usage, reason: StopReason | None, sequence: str | None
    ) -> MessageReply:
        return MessageReply(self._id, self._model, blocks, reason, sequence, MessageUsage.of(usage))

    def _stop(self, reason: EndReason, stop: str | None, usage: Usage) -> tuple[StopReason, str | None]:
        """Why the answer ended, and at which of the caller's strings."""
        if reason == "tool_calls":
            return "tool_use", None
        if reason == "length":
            full = usage.num_output_tokens >= self._max_tokens
            return "max_tokens" if full else "model_context_window_exceeded", None
        return ("end_turn", None) if stop is None else ("stop_sequence", stop)


def _failed(error: Exception) -> bytes:
    _, told = reply_to(error).anthropic()
    return named([told])


ANTHROPIC = Form(named, _failed)


def _is_whole(call: ToolCall) -> bool:
    """Whether its arguments are an object; `max_tokens` may have cut them."""
    try:
        msgspec.json.decode(call.arguments, type=dict[str, object])
    except msgspec.DecodeError:
        return False
    return True
