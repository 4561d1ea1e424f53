"""A conversation in the one form that the front end works with, whoever it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.tools import FREE_CHOICE, Tool, ToolChoice
from dashinfer_vlm.media.types import MediaRef

ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 100
"""Levels of the arguments of a tool call. Templates and the guard against special tokens walk through them."""


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    ref: MediaRef


Part = TextPart | MediaPart


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the assistant made in an earlier turn; `arguments` is the text of a JSON object, or empty for one
    without fields, as some clients write it."""

    name: str
    arguments: str
    id: str | None = None

    def read_arguments(self) -> object:
        """What `arguments` say; None for what is no JSON."""
        with suppress(ValueError, RecursionError):  # the latter for thousands of brackets
            return json.loads(self.arguments)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. Media stand where they stand among the texts; a system turn holds text only."""

    role: str
    content: str | tuple[Part, ...] = ""
    name: str | None = None
    reasoning: str | None = None
    """What the assistant thought before it said this."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def refs(self) -> Iterator[MediaRef]:
        if not isinstance(self.content, str):
            yield from (part.ref for part in self.content if isinstance(part, MediaPart))

    @property
    def num_chars(self) -> int:
        """Characters of its text."""
        if isinstance(self.content, str):
            return len(self.content) + len(self.reasoning or "")
        texts = sum(len(part.text) for part in self.content if isinstance(part, TextPart))
        return texts + len(self.reasoning or "")

    @property
    def num_argument_chars(self) -> int:
        """Characters of its tool calls' arguments, which are read as JSON and written anew."""
        return sum(len(call.arguments) for call in self.tool_calls)

    def validate(self, where: str) -> None:
        """Raise InvalidRequestError for a role, a system image or tool arguments that cannot be; `where` names it."""
        if self.role not in ROLES:
            raise InvalidRequestError(
                f"{where}.role is {self.role!r}; it must be one of {', '.join(ROLES)}", param=f"{where}.role"
            )
        if self.role == "system" and any(True for _ in self.refs):
            raise InvalidRequestError(
                f"{where} is a system message with an image or a video; put it into a user message",
                param=f"{where}.content",
            )

    def for_template(self) -> dict[str, Any]:
        """The dict that chat templates expect: media are bare `{"type": kind}` parts, arguments are objects."""
        fields: dict[str, Any] = {"role": self.role, "content": self._template_content()}
        if self.name is not None:
            fields["name"] = self.name
        if self.reasoning is not None:
            fields["reasoning_content"] = self.reasoning
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            fields["tool_calls"] = [_template_call(call) for call in self.tool_calls]
        return fields

    def _template_content(self) -> str | list[dict[str, str]]:
        if isinstance(self.content, str):
            return self.content
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": part.ref.kind}
            for part in self.content
        ]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Everything that the chat template is given to make a prompt of."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    """Those that the model is shown; none are called without."""
    choice: ToolChoice = FREE_CHOICE
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More variables of the template, plain JSON values: vLLM's `chat_template_kwargs`."""
    effort: str | None = None
    """How much to think before the answer, in OpenAI's words; None: as the template has it."""
    param: str = "messages"
    """What its caller calls the conversation, for error messages."""
    thinks: bool | None = None
    """Whether to think at all; None: as the template has it."""

    @property
    def callable_names(self) -> list[str]:
        """The tools that an answer may call."""
        names = self.choice.names
        return [tool.name for tool in self.tools if names is None or tool.name in names]

    @property
    def is_sure(self) -> bool:
        """Whether a grammar is to keep calls in their form: where one is asked for, or a tool is strict."""
        names = set(self.callable_names)
        strict = any(tool.strict and tool.name in names for tool in self.tools)
        return bool(names) and (self.choice.must_call or strict)

    @property
    def num_tool_chars(self) -> int:
        """Characters of its tools as JSON."""
        return sum(len(msgspec.json.encode(tool.for_template())) for tool in self.tools)


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise InvalidRequestError for an empty conversation or the first message that cannot be."""
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one message", param="messages")
    for i, message in enumerate(messages):
        message.validate(f"messages[{i}]")


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments = call.read_arguments() if call.arguments else {}
    if not isinstance(arguments, dict) or _is_deeper(arguments, MAX_DEPTH):
        raise InvalidRequestError(
            f"the arguments of the tool call {call.name!r} are not a JSON object of at most {MAX_DEPTH} levels; "
            "a call that a limit of tokens has cut cannot be gone on with",
            param="messages.tool_calls",
        )
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _is_deeper(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(child, levels - 1) for child in children)
