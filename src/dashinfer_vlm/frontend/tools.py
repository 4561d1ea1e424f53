"""The tools that a model may call in its answer, and how it may choose among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


FREE_CHOICE = ToolChoice()
"""OpenAI's `auto`. Its `none` is a dialogue without tools: what the model is not shown it does not call."""
