"""What an answer says, piece by piece: text, reasoning, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from dashinfer_vlm.frontend.messages import ToolCall

__all__ = ["CallArguments", "CallStart", "Piece", "ReasoningPiece", "Said", "TextPiece", "join"]


class TextPiece(msgspec.Struct, frozen=True, gc=False):
    """What people read."""

    text: str


class ReasoningPiece(msgspec.Struct, frozen=True, gc=False):
    """What the model thought before it answered."""

    text: str


class CallStart(msgspec.Struct, frozen=True, gc=False):
    """The beginning of the answer's call `index`, counted from 0; its arguments follow, and no other call's between."""

    index: int
    id: str
    """Of this call alone."""
    name: str


class CallArguments(msgspec.Struct, frozen=True, gc=False):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = TextPiece | ReasoningPiece | CallStart | CallArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A whole answer's pieces, put together."""

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def join(pieces: Iterable[Piece]) -> Said:
    """`pieces` are those of one answer, from its first on."""
    texts: list[str] = []
    thoughts: list[str] = []
    starts: list[CallStart] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        match piece:
            case TextPiece(text):
                texts.append(text)
            case ReasoningPiece(text):
                thoughts.append(text)
            case CallStart():
                starts.append(piece)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
    calls = (
        ToolCall(id=start.id, name=start.name, arguments="".join(texts))
        for start, texts in zip(starts, arguments, strict=True)
    )
    return Said(text="".join(texts), reasoning="".join(thoughts), calls=tuple(calls))
