"""The items of an output while they are written: each opens, grows and closes, with events for every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from dashinfer_vlm.server.responses.replies import (
    ArgumentsDelta,
    ArgumentsDone,
    CallItem,
    Event,
    ItemAdded,
    ItemDone,
    Logprobs,
    MessageItem,
    OutputItem,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    TextDelta,
    TextDone,
)


class OpenItem(ABC):
    """An item that is being written; `begin`, its own way to grow, then `end`, each with the events that tell it."""

    def __init__(self, id: str, index: int, numbers: Iterator[int]) -> None:
        """`index` is its place in the output; `numbers` count the events of the stream."""
        self.id = id
        self.index = index
        self.numbers = numbers
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.texts)

    @abstractmethod
    def begin(self) -> list[Event]: ...

    @abstractmethod
    def end(self, status: str) -> list[Event]: ...

    @abstractmethod
    def item(self, status: str) -> OutputItem:
        """In its last state."""

    def _added(self, item: OutputItem) -> Event:
        return ItemAdded(next(self.numbers), self.index, item)

    def _done(self, status: str) -> Event:
        return ItemDone(next(self.numbers), self.index, self.item(status))


class OpenMessage(OpenItem):
    """Text for people."""

    def __init__(self, id: str, index: int, numbers: Iterator[int]) -> None:
        super().__init__(id, index, numbers)
        self._logprobs: Logprobs = []

    def begin(self) -> list[Event]:
        added = self._added(MessageItem(self.id, "in_progress", []))
        return [added, PartAdded(next(self.numbers), self.id, self.index, 0, OutputText(""))]

    def more(self, text: str, logprobs: Logprobs) -> list[Event]:
        """`logprobs` are the rows of the text's tokens, where they are asked for."""
        self.texts.append(text)
        self._logprobs += logprobs
        return [TextDelta(next(self.numbers), self.id, self.index, 0, text, logprobs)]

    def end(self, status: str) -> list[Event]:
        done = TextDone(next(self.numbers), self.id, self.index, 0, self.text, self._logprobs)
        return [done, PartDone(next(self.numbers), self.id, self.index, 0, self._part()), self._done(status)]

    def item(self, status: str) -> MessageItem:
        return MessageItem(self.id, status, [self._part()])

    def _part(self) -> OutputText:
        return OutputText(self.text, self._logprobs)


class OpenReasoning(OpenItem):
    def begin(self) -> list[Event]:
        added = self._added(ReasoningItem(self.id, "in_progress", []))
        return [added, PartAdded(next(self.numbers), self.id, self.index, 0, ReasoningText(""))]

    def more(self, text: str) -> list[Event]:
        self.texts.append(text)
        return [ReasoningDelta(next(self.numbers), self.id, self.index, 0, text)]

    def end(self, status: str) -> list[Event]:
        done = ReasoningDone(next(self.numbers), self.id, self.index, 0, self.text)
        part = PartDone(next(self.numbers), self.id, self.index, 0, ReasoningText(self.text))
        return [done, part, self._done(status)]

    def item(self, status: str) -> ReasoningItem:
        return ReasoningItem(self.id, status, [ReasoningText(self.text)])


class OpenCall(OpenItem):
    """A call of a tool; its text is its arguments."""

    def __init__(self, id: str, index: int, numbers: Iterator[int], *, call_id: str, name: str) -> None:
        super().__init__(id, index, numbers)
        self._call_id = call_id
        self._name = name

    def begin(self) -> list[Event]:
        return [self._added(self.item("in_progress"))]

    def more(self, text: str) -> list[Event]:
        self.texts.append(text)
        return [ArgumentsDelta(next(self.numbers), self.id, self.index, text)]

    def end(self, status: str) -> list[Event]:
        return [ArgumentsDone(next(self.numbers), self.id, self.index, self.text, self._name), self._done(status)]

    def item(self, status: str) -> CallItem:
        return CallItem(self.id, status, self._call_id, self._name, self.text)
