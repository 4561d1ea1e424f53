"""A call as JSON between its tags, the form of Hermes: read as it comes."""

from __future__ import annotations

import re

import msgspec

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_NO_CALL = re.compile(r"\s*[^\s{]")


class JsonCall:
    """Reads `{"name": "look", "arguments": {"at": "the sky"}}`."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.rest: str | None = None
        self.is_broken = False
        self._text = ""
        self._object = _ObjectScanner()
        self._arguments = _ObjectScanner()
        self._in_arguments = False
        self._news = ""

    def push(self, text: str) -> None:
        self._text += text
        if _NO_CALL.match(self._text):
            self.is_broken = True
            return
        self._read_arguments(text)
        end = self._object.end(text)
        if end is not None:
            self.rest = text[end:]
            self._finish(self._text[: len(self._text) - len(self.rest)])

    def take(self) -> str:
        news, self._news = self._news, ""
        return news

    def _read_arguments(self, text: str) -> None:
        """As far as they are where most calls have them: behind the name."""
        if self.name is None:
            header = _HEADER.match(self._text)
            if header is None:
                return
            self.name, self._in_arguments, text = header[1], True, self._text[header.end() :]
        if self._in_arguments:
            end = self._arguments.end(text)
            self._news += text[:end]
            self._in_arguments = end is None

    def _finish(self, text: str) -> None:
        call = _decode(text)
        if call is None:
            self.is_broken = True
        elif self.name is None:
            self.name, self._news = call.name, bytes(call.arguments).decode()


class _ObjectScanner:
    """Finds where a JSON object ends that comes in pieces."""

    _OUTSIDE = re.compile(r'["{}\[\]]')
    _INSIDE = re.compile(r'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._skip = 0
        """Characters at the front of the next piece that an escape has used up."""

    def end(self, text: str) -> int | None:
        """The index in `text` behind the object; None where it goes on in the next piece."""
        at, self._skip = self._skip, 0
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


def _decode(text: str) -> _Call | None:
    try:
        call = msgspec.json.decode(text, type=_Call)
        msgspec.json.decode(call.arguments, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError):  # the latter for thousands of brackets
        return None
    return call
