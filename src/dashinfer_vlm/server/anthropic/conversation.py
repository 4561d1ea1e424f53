"""Anthropic's turns made into the conversation that the front end works with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import msgspec

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.messages import MediaPart, Message, Part, TextPart, ToolCall
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.server.anthropic.blocks import (
    AnyTurnBody,
    ImageBlockBody,
    TextBlockBody,
    ThinkingBody,
    ToolResultBody,
    ToolUseBody,
    UrlSourceBody,
    blocks_of,
)

Placed = tuple[str, Any]
"""A block, and the path at which it stands."""


def read_turns(system: str | list[TextBlockBody] | None, turns: Sequence[AnyTurnBody]) -> list[Message]:
    """Turns of one role that follow each other are one. Raises InvalidRequestError."""
    messages = [Message(role="system", content=_system_text(system))] if system else []
    for role, run in groupby(enumerate(turns), key=lambda item: item[1].role):
        blocks = [block for i, turn in run for block in blocks_of(turn, f"messages[{i}]")]
        if role == "user":
            messages += _of_user(blocks)
        else:
            messages.append(_of_assistant(blocks) if role == "assistant" else _with_text(role, blocks))
    if messages and messages[-1].tool_calls:
        raise InvalidRequestError("messages ends with a tool_use; its tool_result is missing", param="messages")
    return messages


def _system_text(system: str | list[TextBlockBody]) -> str:
    return system if isinstance(system, str) else "".join(block.text for block in system)


def _of_user(blocks: Iterable[Placed]) -> list[Message]:
    """Results of tools are turns of their own, where they stand among what the user says. Who says nothing has one
    too."""
    messages: list[Message] = []
    for is_result, run in groupby(blocks, key=lambda block: isinstance(block[1], ToolResultBody)):
        if is_result:
            messages += [_result(body, where) for where, body in run]
        else:
            messages.append(_with_text("user", run))
    return messages or [Message(role="user", content="")]


def _of_assistant(blocks: Sequence[Placed]) -> Message:
    bodies = [body for _, body in blocks]
    thoughts = [body.thinking for body in bodies if isinstance(body, ThinkingBody)]
    return Message(
        role="assistant",
        content="".join(body.text for body in bodies if isinstance(body, TextBlockBody)),
        reasoning="".join(thoughts) if thoughts else None,
        tool_calls=tuple(_call(body) for body in bodies if isinstance(body, ToolUseBody)),
    )


def _with_text(role: str, blocks: Iterable[Placed]) -> Message:
    return Message(role=role, content=_content([_part(body, where) for where, body in blocks]))


def _call(body: ToolUseBody) -> ToolCall:
    return ToolCall(id=body.id, name=body.name, arguments=msgspec.json.encode(body.input).decode())


def _result(body: ToolResultBody, where: str) -> Message:
    """What a failed tool said begins with "Error: ", since templates know no other way to say so."""
    blocks = body.content or ""
    parts: list[Part] = [TextPart("Error: ")] if body.is_error else []
    if isinstance(blocks, str):
        parts.append(TextPart(blocks))
    else:
        parts += [_part(block, f"{where}.content[{i}]") for i, block in enumerate(blocks)]
    return Message(role="tool", content=_content(parts), tool_call_id=body.tool_use_id)


def _content(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    """Text alone is one string, which every template knows."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return "".join(texts) if len(texts) == len(parts) else tuple(parts)


def _part(block: TextBlockBody | ImageBlockBody, where: str) -> Part:
    if isinstance(block, TextBlockBody):
        return TextPart(block.text)
    source = block.source
    if isinstance(source, UrlSourceBody):
        return MediaPart(MediaRef(kind="image", source=source.url, param=f"{where}.source.url"))
    if source.data.startswith("data:"):
        raise InvalidRequestError(f"{where}.source.data is a data URL; send what stands behind its comma", param=where)
    url = f"data:image/*;base64,{source.data}"
    return MediaPart(MediaRef(kind="image", source=url, param=f"{where}.source.data"))
