"""The tools that a model may call in its answer, and how it may choose among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dashinfer_vlm.errors import InvalidRequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function of the caller's."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: ANY_OBJECT)
    """A JSON schema of its arguments."""
    strict: bool = False
    """Whether arguments must follow the schema even where a call is the model's own idea."""

    def for_template(self) -> dict[str, Any]:
        """The dict that chat templates expect."""
        description = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **description, "parameters": self.parameters}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """What an answer may and must do with the tools that the model is shown."""

    must_call: bool = False
    """The answer is calls and nothing else."""
    names: tuple[str, ...] | None = None
    """The tools that may be called; None: all."""
    parallel: bool = True
    """Whether one answer may hold several calls."""

    @property
    def is_named(self) -> bool:
        """Whether the caller has said which one tool is called, once."""
        return self.must_call and self.names is not None and len(self.names) == 1 and not self.parallel


FREE_CHOICE = ToolChoice()
"""OpenAI's `auto`. Its `none` is a dialogue without tools: what the model is not shown it does not call."""


def check_tool_name(name: str, where: str) -> None:
    """Raise InvalidRequestError for a name that no tool can have; `where` is its field."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{where} is {name[:200]!r}; it must be 1 to 128 letters, digits, '_', '.' and '-'", param=where
        )


def offer(tools: Sequence[Tool], choice: ToolChoice | None) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that the model is shown, and how it may choose; without a choice it is shown none.

    Raises InvalidRequestError for tools that cannot be offered together, and for a choice that they do not allow.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} tools; {MAX_TOOLS} are the most", param="tools")
    known = {tool.name for tool in tools}
    if len(known) < len(tools):
        raise InvalidRequestError("tools has two of the same name", param="tools")
    if choice is None:
        return (), FREE_CHOICE
    if not tools and choice.must_call:
        raise InvalidRequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    for name in choice.names or ():
        if name not in known:
            raise InvalidRequestError(f"tool_choice names {name[:200]!r}, which is no tool", param="tool_choice")
    return tuple(tools), choice
