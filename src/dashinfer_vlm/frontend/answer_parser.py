"""The text of an answer read as it comes: reasoning split off, calls of tools told from text.

The tags are those that Qwen's models write: `<think>`, and the form of Hermes for calls,

    <tool_call>
    {"name": "look", "arguments": {"at": "the sky"}}
    </tool_call>

Only what may be a tag, or may turn out to be a call, is held back. Whatever pieces the text comes in, it reads the
same.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from dashinfer_vlm.frontend.pieces import CallArguments, CallStart, Piece, ReasoningPiece, TextPiece

__all__ = ["CALL", "CALL_END", "PLAIN", "TAGS", "THINK", "THINK_END", "AnswerForm", "AnswerParser"]

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
TAGS = (THINK, THINK_END, CALL, CALL_END)

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_NO_CALL = re.compile(r"\s*[^\s{]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """How an answer is to be read."""

    may_think: bool = False
    """It may begin with reasoning."""
    begins_in_thought: bool = False
    """The prompt has opened the reasoning already."""
    names: frozenset[str] = frozenset()
    """The tools that it may call; calls of others are text."""
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
        self._scanner = _ObjectScanner()
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
        if self._read == self._after_object:
            self._finish_call(len(self._held))
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
        self._scanned, self._scanner, self._read = self._body, _ObjectScanner(), self._call
        return True

    def _let_go(self, tag: str) -> str:
        """All that cannot belong to `tag` or to the line ends before it; the rest stays held."""
        text = self._held
        most = min(len(tag) - 1, len(text))
        partial = next((n for n in range(most, 0, -1) if tag.startswith(text[-n:])), 0)
        kept = len(text[: len(text) - partial].rstrip("\n"))
        self._held = text[kept:]
        return text[:kept]

    def _call(self) -> bool:
        """Behind the tag: from `_body` on stands, or should stand, an object; `_scanned` is how far it was looked
        at."""
        if _NO_CALL.match(self._held, self._body):
            return self._give_up()
        if self._form.sure and (header := _HEADER.match(self._held, self._body)):
            return self._begin_arguments(header)
        end = self._scanner.end(self._held, self._scanned)
        self._scanned = len(self._held)
        if end is None:
            return False
        self._object_end, self._read = end, self._after_object
        return True

    def _after_object(self) -> bool:
        """A call is one when its end tag is there; anything else makes it text."""
        rest = self._held[self._object_end :].lstrip()
        if rest.startswith(CALL_END):
            return self._finish_call(len(self._held) - len(rest) + len(CALL_END))
        return False if CALL_END.startswith(rest) else self._give_up()

    def _finish_call(self, end: int) -> bool:
        """Tell the call, if what stands there is one; the held text goes on at `end`."""
        call = _read_call(self._held[self._body : self._object_end])
        if call is None or call.name not in self._form.names:
            return self._give_up()
        self._start_call(call.name)
        self._news.append(CallArguments(self.num_calls - 1, bytes(call.arguments).decode()))
        return self._end_call(end)

    def _cut_call(self) -> None:
        """No more comes of what may be a call. Where it names a tool it is told, as is what there is of its
        arguments."""
        if self._read == self._text:
            self._held = self._held.partition(CALL[0])[0]
        elif self._read == self._call:
            header = _HEADER.match(self._held, self._body)
            if header is None:
                self._held = ""
            elif header[1] in self._form.names:
                self._begin_arguments(header)
                self._arguments()

    def _give_up(self) -> bool:
        """It is no call: its tag is text, and so is what follows up to the next one."""
        self._tell_text(self._held[: self._body])
        self._held, self._read = self._held[self._body :], self._text
        return True

    def _begin_arguments(self, header: re.Match[str]) -> bool:
        self._start_call(header[1])
        self._held, self._scanner, self._read = self._held[header.end() :], _ObjectScanner(), self._arguments
        return True

    def _arguments(self) -> bool:
        end = self._scanner.end(self._held, 0)
        told = self._held[:end]
        self._news.append(CallArguments(self.num_calls - 1, told))
        self._held = self._held[len(told) :]
        if end is not None:
            self._read = self._after_arguments
        return end is not None

    def _after_arguments(self) -> bool:
        at = self._held.find(CALL_END)
        return at >= 0 and self._end_call(at + len(CALL_END))

    def _start_call(self, name: str) -> None:
        self._news.append(CallStart(self.num_calls, f"call_{secrets.token_hex(12)}", name))
        self.num_calls += 1

    def _end_call(self, end: int) -> bool:
        self._held = self._held[end:]
        self._read = self._text if self._form.parallel else None
        return True


class _ObjectScanner:
    """Finds where a JSON object ends that comes in pieces."""

    _OUTSIDE = re.compile(r'["{}\[\]]')
    _INSIDE = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._skip = 0
        """Characters at the front of the next piece that an escape has used up."""

    def end(self, text: str, at: int) -> int | None:
        """The index behind the object, looking at `text` from `at` on; None where it goes on in the next piece."""
        at, self._skip = at + self._skip, 0
        while found := (self._INSIDE if self._in_string else self._OUTSIDE).search(text, at):
            at = found.end()
            match found[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    at += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        self._skip = max(0, at - len(text))
        return None


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def _read_call(text: str) -> _Call | None:
    try:
        call = msgspec.json.decode(text, type=_Call)
        msgspec.json.decode(call.arguments, type=dict[str, object])
    except msgspec.DecodeError:
        return None
    return call
