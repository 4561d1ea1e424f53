"""A call as XML between its tags, the form of Qwen3-Coder and Qwen3.5: read as it comes, its arguments told as JSON.

    <function=look>
    <parameter=at>
    the sky
    </parameter>
    </function>

A line end before and one behind a value are not its own, all other blanks are. Nothing but the schema of the tool says
whether `42` is a number or a text. Nothing is escaped, so a value goes on up to the first `</parameter>`; where a line
in it begins with another tag, that one is missing, and it is no call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dashinfer_vlm.engine.grammars.alternatives import Schema, alternatives

__all__ = ["PARAMETER", "XmlCall"]

PARAMETER = "<parameter="
"""What no other form of calls has."""
_FUNCTION = "<function="
_FUNCTION_END, _PARAMETER_END = "</function>", "</parameter>"
_FUNCTION_TAG = re.compile(r"\s*<function=([^<>\s]+)>")
_PARAMETER_TAG = re.compile(r"\s*<parameter=([^>\n]+)>")
_VALUE_END = re.compile(rf"\n?{_PARAMETER_END}|\n(?={PARAMETER}|{_FUNCTION_END})")
_VALUE_ENDS = (f"\n{_PARAMETER_END}", _PARAMETER_END, f"\n{PARAMETER}", f"\n{_FUNCTION_END}")

_BLANKS = " \t\r\n"
"""Around JSON."""
_SPELLINGS = {"True": "true", "False": "false", "None": "null"}
"""The template writes the arguments of earlier calls as Python does, and so may the model."""


class XmlCall:
    """Reads one call of a tool whose arguments the schema of its name describes."""

    def __init__(self, schemas: Mapping[str, Schema]) -> None:
        self.name: str | None = None
        self.rest: str | None = None
        self.is_broken = False
        self._schemas = schemas
        self._text = ""
        """Not read yet."""
        self._read: Callable[[], bool] = self._function
        """The state: takes what it can from the front of the text, and says whether there may be more to take."""
        self._news = ""
        self._is_first = True
        """No parameter has been read."""
        self._types: list[str] = []
        """Those that the parameter may have beside that of a string, in the order in which they are tried."""
        self._value = ""
        """Of it, unless it is told as it comes."""
        self._is_begun = False
        """It has characters that were read."""

    def push(self, text: str) -> None:
        self._text += text
        while not self.is_broken and self.rest is None and self._read():
            pass

    def take(self) -> str:
        news, self._news = self._news, ""
        return news

    def _function(self) -> bool:
        tag = _FUNCTION_TAG.match(self._text)
        if tag is None:
            rest = self._text.lstrip()
            name = rest.removeprefix(_FUNCTION)
            self.is_broken = not _FUNCTION.startswith(rest) and (name == rest or re.search(r"[<>\s]", name) is not None)
            return False
        self.name, self._news = tag[1], "{"
        self._text, self._read = self._text[tag.end() :], self._between
        return True

    def _between(self) -> bool:
        """Where a parameter may begin, or the call end."""
        if tag := _PARAMETER_TAG.match(self._text):
            self._begin_value(tag[1])
            self._text, self._read = self._text[tag.end() :], self._in_value
            return True
        rest = self._text.lstrip()
        if rest.startswith(_FUNCTION_END):
            self._news += "}"
            self.rest = rest[len(_FUNCTION_END) :]
            return False
        name = rest.removeprefix(PARAMETER)
        begins = any(tag.startswith(rest) for tag in (PARAMETER, _FUNCTION_END))
        self.is_broken = not begins and (name == rest or re.search(r"[>\n]", name) is not None)
        return False

    def _begin_value(self, key: str) -> None:
        root = self._schemas.get(self.name or "", {})
        properties = root.get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        types = (leaf.get("type", "string") for leaf in alternatives(schema, root))
        self._types = [name for name in types if name != "string"]
        self._news += f"{'' if self._is_first else ', '}{_json(key)}: " + ('"' if self._is_text else "")
        self._is_first, self._is_begun, self._value = False, False, ""

    @property
    def _is_text(self) -> bool:
        """Whatever the parameter's value says, it is a string."""
        return not self._types

    def _in_value(self) -> bool:
        end = _VALUE_END.search(self._text)
        if end is None:
            self._add(self._let_go())
            return False
        self._add(self._text[: end.start()])
        if end[0] == _PARAMETER_END and not self._is_text and _is_unfinished(self._value):
            self._add(end[0])
            self._text = self._text[end.end() :]
            return True
        if not end[0].endswith(_PARAMETER_END):
            self.is_broken = True
            return False
        self._news += '"' if self._is_text else _typed(self._value, self._types)
        self._text, self._read = self._text[end.end() :], self._between
        return True

    def _let_go(self) -> str:
        """All that cannot belong to what ends a value; the rest stays in the text."""
        text = self._text
        lengths = range(min(max(map(len, _VALUE_ENDS)) - 1, len(text)), 0, -1)
        kept = next((n for n in lengths if any(end.startswith(text[-n:]) for end in _VALUE_ENDS)), 0)
        self._text = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _add(self, text: str) -> None:
        if text and not self._is_begun:
            self._is_begun, text = True, text.removeprefix("\n")
        if self._is_text:
            self._news += _json(text)[1:-1]
        else:
            self._value += text


def _typed(text: str, types: list[str]) -> str:
    """The JSON of a value that was written as `text`: of the first of `types` that it fits, else a string, as any text
    is."""
    bare = text.strip(_BLANKS)
    bare = _SPELLINGS.get(bare, bare)
    try:
        value = msgspec.json.decode(bare)
    except (msgspec.DecodeError, RecursionError):  # the latter for thousands of brackets
        return _json(text)
    return bare if any(_fits(value, name) for name in types) else _json(text)


def _is_unfinished(text: str) -> bool:
    """Whether what follows may still be of the same array or object: no string in it holds a line end, but any tag."""
    if not text.lstrip(_BLANKS).startswith(("[", "{")):
        return False
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return True
    return False


def _fits(value: object, name: str) -> bool:
    """Whether a JSON value is of this type."""
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int or (type(value) is float and value.is_integer())
        case "number":
            return type(value) in (int, float)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case _:
            return False


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
