"""Items of an input as turns: what one answer said, thought and called belongs to one turn of the assistant's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.conversation import ContentReader, ProcessorBody
from dashinfer_vlm.frontend.messages import Message, Part, TextPart, ToolCall
from dashinfer_vlm.frontend.parts import PartBody
from dashinfer_vlm.server.responses.items import (
    AnyItem,
    CallItemBody,
    CallOutputItemBody,
    MessageItemBody,
    ReasoningItemBody,
)


@dataclass(frozen=True, slots=True)
class Placed:
    """An item and the path of the request's field that it came by."""

    item: AnyItem
    where: str


def read_turns(
    items: Sequence[Placed],
    bounds: tuple[int, int],
    *,
    instructions: str | None = None,
    processor: ProcessorBody | None = None,
) -> list[Message]:
    """`instructions` go first; `bounds` are the least and most pixels of an image here. Raises InvalidRequestError."""
    reader = ContentReader([_content(placed.item) for placed in items], bounds, processor)
    turns = [] if instructions is None else [Message(role="system", content=instructions)]
    answer = _Answer()
    for placed in items:
        if not answer.takes(placed.item):
            turns += answer.turns()
            answer = _Answer()
        match placed.item:
            case MessageItemBody(role="assistant") | CallItemBody() | ReasoningItemBody():
                answer.add(placed, reader)
            case _:
                turns.append(_turn(placed, reader))
    return turns + answer.turns()


def _content(item: AnyItem) -> str | Sequence[PartBody] | None:
    match item:
        case MessageItemBody(content=content) | CallOutputItemBody(output=content):
            return content
    return None


def _read(reader: ContentReader, content: str | Sequence[PartBody], where: str) -> str | tuple[Part, ...]:
    """Parts that are all text are one text: this API has texts in parts only, and not every template takes parts."""
    read = reader.read(content, where)
    if isinstance(read, str):
        return read
    texts = [part.text for part in read if isinstance(part, TextPart)]
    return "".join(texts) if len(texts) == len(read) else read


def _turn(placed: Placed, reader: ContentReader) -> Message:
    item, where = placed.item, placed.where
    if isinstance(item, CallOutputItemBody):
        return Message(role="tool", content=_read(reader, item.output, f"{where}.output"), tool_call_id=item.call_id)
    assert isinstance(item, MessageItemBody), item
    role = "system" if item.role == "developer" else item.role
    message = Message(role=role, content=_read(reader, item.content, f"{where}.content"))
    message.validate(where)
    return message


def _call(item: CallItemBody, where: str) -> ToolCall:
    call = ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)
    if item.status == "incomplete" and call.read_arguments() is None:
        raise InvalidRequestError(
            f"{where}: the call of {item.name!r} is incomplete, since max_output_tokens has cut the answer that makes "
            "it; ask again with a larger limit",
            param=where,
        )
    return call


@dataclass(slots=True)
class _Answer:
    """A turn of the assistant's on its way."""

    reasoning: list[str] = field(default_factory=list)
    content: str | tuple[Part, ...] | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def takes(self, item: AnyItem) -> bool:
        """Whether `item` may belong to it: reasoning comes first, and there is one text."""
        match item:
            case ReasoningItemBody():
                return self.content is None and not self.calls
            case MessageItemBody(role="assistant"):
                return self.content is None
        return isinstance(item, CallItemBody)

    def add(self, placed: Placed, reader: ContentReader) -> None:
        match placed.item:
            case ReasoningItemBody() as item:
                self.reasoning.append(item.text)
            case MessageItemBody() as item:
                self.content = _read(reader, item.content, f"{placed.where}.content")
            case CallItemBody() as item:
                self.calls.append(_call(item, placed.where))

    def turns(self) -> list[Message]:
        """The turn, unless it is empty."""
        if self.content is None and not self.reasoning and not self.calls:
            return []
        return [
            Message(
                role="assistant",
                content=self.content or "",
                reasoning="\n".join(self.reasoning) if self.reasoning else None,
                tool_calls=tuple(self.calls),
            )
        ]
