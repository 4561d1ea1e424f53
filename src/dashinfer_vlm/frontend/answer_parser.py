"""The text of an answer read as it comes: reasoning split off, calls of tools told from text.

The tags are those that Qwen's models write: `<think>`, and `<tool_call>` around a call. What stands in a call is JSON
(`json_calls`) or XML (`xml_calls`), as the model's template has it.

Only what may be a tag, or may turn out to be a call, is held back. Whatever pieces the text comes in, it reads the
same.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dashinfer_vlm.frontend.json_calls import JsonCall
from dashinfer_vlm.frontend.pieces import CallArguments, CallStart, Piece, ReasoningPiece, TextPiece
from dashinfer_vlm.frontend.xml_calls import XmlCall

__all__ = ["CALL", "CALL_END", "PLAIN", "TAGS", "THINK", "THINK_END", "AnswerForm", "AnswerParser"]

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
TAGS = (THINK, THINK_END, CALL, CALL_END)


class CallReader(Protocol):
    """Reads what stands between the tags of one call, in pieces, and tells its arguments as the text of JSON."""

    name: str | None
    """Of the tool, once it is known."""
    rest: str | None
    """What was pushed behind the call, once that is whole."""
    is_broken: bool
    """It is no call; nothing more is pushed."""

    def push(self, text: str) -> None:
        """More of it, up to where it is whole or broken."""
        ...

    def take(self) -> str:
        """More of its arguments: what has become certain since the last time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """How an answer is to be read."""

    may_think: bool = False
    """It may begin with reasoning."""
    begins_in_thought: bool = False
    """The prompt has opened the reasoning already."""
    names: frozenset[str] = frozenset()
    """The tools that it may call; calls of others are text."""
    schemas: Mapping[str, Mapping[str, Any]] | None = None
    """Where calls are XML: the JSON schemas of what tools take, by their names."""
    parallel: bool = True
    """False: it is over after its first call."""
    sure: bool = False
    """A grammar allows well-formed calls alone, so that their arguments are told as they come."""

    @property
    def is_plain(self) -> bool:
        """Everything is text."""
        return not (self.may_think or self.begins_in_thought or self.names)


PLAIN = AnswerForm()


class AnswerParser:
    """Reads one answer: `push` its text in pieces, then `flush` once."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._held = ""
        self._news: list[Piece] = []
        self._read: Callable[[], bool] | None = self._first_state()
        """The state: takes what it can from the front of the held text, and says whether there may be more to take."""
        self.in_thought = form.begins_in_thought
        """What comes now is reasoning."""
        self._is_plain = form.is_plain
        self._call_reader = self._new_call()
        self.num_calls = 0
        self.ends_in_call = False
        """It is flushed, and its last call was not whole."""

    @property
    def is_over(self) -> bool:
        """It has called the one tool that it may call; what follows is not looked at."""
        return self._read is None

    def push(self, text: str) -> list[Piece]:
        """What has become certain."""
        if self._is_plain:
            return [TextPiece(text)] if text else []
        self._held += text
        while self._read is not None and self._held and self._read():
            pass
        return self._take()

    def flush(self, *, cut: bool = False) -> list[Piece]:
        """What was held back: a call that is whole but for its end tag is one, one that is not is text.

        `cut`: the model had more to say. A call that has been begun is then told as far as it came, and not as text.
        """
        if self._read == self._after_call:
            self._finish_call("")
        elif cut:
            self._cut_call()
        self.ends_in_call = self._read == self._arguments
        held, self._held = self._held, ""
        if self._read in (self._thought, self._thought_begins):
            self._tell_thought(held.rstrip("\n"))
        elif self._read in (self._start, self._text, self._call):
            self._tell_text(held if self.num_calls == 0 else held.rstrip("\n"))
        self._read = None
        return self._take()

    def _first_state(self) -> Callable[[], bool]:
        if self._form.begins_in_thought:
            return self._thought_begins
        return self._start if self._form.may_think else self._text

    def _take(self) -> list[Piece]:
        news, self._news = self._news, []
        return news

    def _tell_text(self, text: str) -> None:
        if text:
            self._news.append(TextPiece(text))

    def _tell_thought(self, text: str) -> None:
        if text:
            self._news.append(ReasoningPiece(text))

    def _start(self) -> bool:
        """Reasoning, if there is any, comes first."""
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self.in_thought, self._read = text[len(THINK) :], True, self._thought_begins
            return True
        if THINK.startswith(text):
            return False
        self._read = self._text
        return True

    def _thought_begins(self) -> bool:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._read = self._thought
        return bool(self._held)

    def _thought(self) -> bool:
        at = self._held.find(THINK_END)
        if at < 0:
            self._tell_thought(self._let_go(THINK_END))
            return False
        self._tell_thought(self._held[:at].rstrip("\n"))
        self._held = self._held[at + len(THINK_END) :]
        self.in_thought, self._read = False, self._text_begins
        return True

    def _text_begins(self) -> bool:
        """Behind reasoning."""
        self._held = self._held.lstrip("\n")
        if self._held:
            self._read = self._text
        return bool(self._held)

    def _text(self) -> bool:
        if not self._form.names:
            self._tell_text(self._held)
            self._held = ""
            return False
        at = self._held.find(CALL)
        if at < 0:
            self._tell_text(self._let_go(CALL))
            return False
        before = len(self._held[:at].rstrip("\n"))
        self._tell_text(self._held[:before])
        self._held, self._body = self._held[before:], at - before + len(CALL)
        self._scanned, self._call_reader, self._read = self._body, self._new_call(), self._call
        return True

    def _new_call(self) -> CallReader:
        return JsonCall() if self._form.schemas is None else XmlCall(self._form.schemas)

    def _let_go(self, tag: str) -> str:
        """All that cannot belong to `tag` or to the line ends before it; the rest stays held."""
        text = self._held
        most = min(len(tag) - 1, len(text))
        partial = next((n for n in range(most, 0, -1) if tag.startswith(text[-n:])), 0)
        kept = len(text[: len(text) - partial].rstrip("\n"))
        self._held = text[kept:]
        return text[:kept]

    def _call(self) -> bool:
        """Behind the tag: from `_body` on stands, or should stand, a call; `_scanned` is how far it was looked at."""
        call = self._call_reader
        call.push(self._held[self._scanned :])
        self._scanned = len(self._held)
        if self._form.sure and call.name in self._form.names:
            self._start_call()
            return self._go_on_behind(call)
        if call.is_broken:
            return self._give_up()
        if call.rest is None:
            return False
        self._call_end, self._read = self._scanned - len(call.rest), self._after_call
        return True

    def _after_call(self) -> bool:
        """A call is one when its end tag is there; anything else makes it text."""
        rest = self._held[self._call_end :].lstrip()
        if rest.startswith(CALL_END):
            return self._finish_call(rest[len(CALL_END) :])
        return False if CALL_END.startswith(rest) else self._give_up()

    def _finish_call(self, rest: str) -> bool:
        """Tell the call, if it is one of a tool that may be called; the held text goes on with `rest`."""
        if self._call_reader.name not in self._form.names:
            return self._give_up()
        self._start_call()
        return self._end_call(rest)

    def _cut_call(self) -> None:
        """No more comes of what may be a call. Where it names a tool it is told, as is what there is of its
        arguments."""
        if self._read == self._text:
            self._held = self._held.partition(CALL[0])[0]
        elif self._read == self._call:
            name = self._call_reader.name
            if name is None:
                self._held = ""
            elif name in self._form.names:
                self._start_call()
                self._held, self._read = "", self._arguments

    def _give_up(self) -> bool:
        """It is no call: its tag is text, and so is what follows up to the next one."""
        self._tell_text(self._held[: self._body])
        self._held, self._read = self._held[self._body :], self._text
        return True

    def _arguments(self) -> bool:
        call = self._call_reader
        if not call.is_broken:
            call.push(self._held)
            self._tell_arguments()
        return self._go_on_behind(call)

    def _go_on_behind(self, call: CallReader) -> bool:
        """What was held has been read, or stands behind the call."""
        self._held, self._read = call.rest or "", self._arguments if call.rest is None else self._behind_arguments
        return call.rest is not None

    def _behind_arguments(self) -> bool:
        _, found, rest = self._held.partition(CALL_END)
        return bool(found) and self._end_call(rest)

    def _start_call(self) -> None:
        """Tell that there is a call, and what there is of its arguments."""
        assert self._call_reader.name is not None
        self._news.append(CallStart(self.num_calls, f"call_{secrets.token_hex(12)}", self._call_reader.name))
        self.num_calls += 1
        self._tell_arguments()

    def _tell_arguments(self) -> None:
        if more := self._call_reader.take():
            self._news.append(CallArguments(self.num_calls - 1, more))

    def _end_call(self, rest: str) -> bool:
        self._held = rest
        self._read = self._text if self._form.parallel else None
        return True
