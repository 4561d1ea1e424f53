"""One response on its way: what the model says becomes items, and every step of that the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any, TypeVar

import msgspec

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.deltas import Delta, EndReason, Usage
from dashinfer_vlm.frontend.pieces import CallArguments, CallStart, Piece, ReasoningPiece, TextPiece
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.server.errors import reply_to
from dashinfer_vlm.server.replies import chat_logprobs
from dashinfer_vlm.server.responses.ids import item_id
from dashinfer_vlm.server.responses.output import OpenCall, OpenItem, OpenMessage, OpenReasoning
from dashinfer_vlm.server.responses.replies import (
    Completed,
    Created,
    ErrorInfo,
    Event,
    Failed,
    Incomplete,
    IncompleteInfo,
    InProgress,
    Logprobs,
    OutputItem,
    ResponseReply,
    ResponseUsage,
)

Text = TypeVar("Text", OpenMessage, OpenReasoning)


class ResponseWriter:
    """`begin`, `news` for every delta, then `end`, `fail` or `cancel`; each gives the events that tell it."""

    def __init__(self, reply: ResponseReply, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self.reply = reply
        """The response as it stands, without the item that is being written."""
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs
        self._numbers = count()
        self._output: list[OutputItem] = []
        self._open: OpenItem | None = None
        self._logprobs: Logprobs = []
        """Of tokens whose text was not told yet."""
        self._reason: EndReason | None = None

    def begin(self) -> list[Event]:
        return [Created(next(self._numbers), self.reply), InProgress(next(self._numbers), self.reply)]

    def news(self, delta: Delta) -> list[Event]:
        if self._wants_logprobs:
            self._logprobs += chat_logprobs(delta.logprobs, self._tokenizer).content
        events = [event for piece in delta.pieces for event in self._tell(piece)]
        if delta.pieces and not isinstance(self._open, OpenMessage):
            self._logprobs = []  # of reasoning and calls none are told
        self._reason = delta.finish_reason
        return events

    def end(self, usage: Usage) -> list[Event]:
        """An answer that says nothing is one with an empty text."""
        events = [] if self._open else self._opened(OpenMessage, "msg")[0]
        told = ResponseUsage.of(usage)
        if self._reason == "length":
            events += self._over("incomplete", usage=told, incomplete_details=IncompleteInfo("max_output_tokens"))
            return [*events, Incomplete(next(self._numbers), self.reply)]
        events += self._over("completed", usage=told, completed_at=int(time.time()))
        return [*events, Completed(next(self._numbers), self.reply)]

    def fail(self, error: Exception, *, stored: bool = True) -> list[Event]:
        """`stored`: the response will be found again, if it was to be."""
        code = "invalid_prompt" if isinstance(error, InvalidRequestError) else "server_error"
        info = ErrorInfo(code, reply_to(error).error.message)
        events = self._over("failed", error=info, store=self.reply.store and stored)
        return [*events, Failed(next(self._numbers), self.reply)]

    def cancel(self) -> None:
        self._over("cancelled")

    def _tell(self, piece: Piece) -> list[Event]:
        match piece:
            case TextPiece(text):
                events, message = self._opened(OpenMessage, "msg")
                logprobs, self._logprobs = self._logprobs, []
                return [*events, *message.more(text, logprobs)]
            case ReasoningPiece(text):
                events, reasoning = self._opened(OpenReasoning, "rs")
                return [*events, *reasoning.more(text)]
            case CallStart(_, call_id, name):
                return self._turn_to(OpenCall(*self._place("fc"), call_id=call_id, name=name))
            case CallArguments(_, text):
                assert isinstance(self._open, OpenCall), self._open
                return self._open.more(text)

    def _opened(self, kind: type[Text], prefix: str) -> tuple[list[Event], Text]:
        """The item that is being written where it is of this kind, else a new one."""
        if isinstance(self._open, kind):
            return [], self._open
        item = kind(*self._place(prefix))
        return self._turn_to(item), item

    def _place(self, prefix: str) -> tuple[str, int, Iterator[int]]:
        """Of the next item: its id, its place in the output, and what counts its events."""
        index = len(self._output) + (self._open is not None)
        return item_id(self.reply.id, prefix, index), index, self._numbers

    def _turn_to(self, item: OpenItem) -> list[Event]:
        events = self._close("completed")
        self._open = item
        return [*events, *item.begin()]

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        events = self._open.end(status)
        self._output.append(self._open.item(status))
        self._open = None
        return events

    def _over(self, status: str, **news: Any) -> list[Event]:
        """The last events of the output; what is still open has come as far as the response has."""
        events = self._close("completed" if status == "completed" else "incomplete")
        self.reply = msgspec.structs.replace(self.reply, status=status, output=list(self._output), **news)
        return events
