"""Server-sent events that end what they show when the client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Protocol

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dashinfer_vlm.frontend.deltas import Delta
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.server.outlet import Outlet

__all__ = ["EventStream", "data", "named", "unnamed"]


class NamedEvent(Protocol):
    """A struct that says what it is."""

    @property
    def type(self) -> str: ...


_LINE_ENDS = {end.encode(): b"\\u%04x" % ord(end) for end in "\x85\u2028\u2029"}
"""Which JSON may hold as they are; all others are escaped anyway. They stand in strings alone."""
Show = Callable[[Delta], bytes]
"""The events that tell a delta; may be none."""


class EventStream(StreamingResponse):
    """Sends `lines`, each of which is one or more whole events and which iterate over `generation`.

    What the engine says while they wait for it goes by `show` right to the connection, if the client reads: to wake a
    task and to pass all who hear of an answer's beginning and end would take as long again as the rest of a token. The
    generation is closed when the response is over, however it ended and also if it never began.
    """

    def __init__(self, lines: AsyncIterator[bytes], generation: Generation, show: Show) -> None:
        # proxies must not collect the events
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._generation = generation
        self._show = show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outlet = Outlet.of(scope)
        self._generation.shortcut = None if outlet is None else partial(outlet.offer, written=self._show)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.shortcut = None
            self._generation.close()


def unnamed(events: Iterable[msgspec.Struct]) -> bytes:
    """Events without names."""
    return b"".join(map(_data, events))


def named(events: Iterable[NamedEvent]) -> bytes:
    """Events named after their `type`."""
    return b"".join(b"event: " + event.type.encode() + b"\n" + _data(event) for event in events)


def data(told: bytes) -> bytes:
    """An event of a JSON text. It is one line for everybody: some clients end lines as Unicode does."""
    if not told.isascii():
        for end, escaped in _LINE_ENDS.items():
            told = told.replace(end, escaped)
    return b"data: %b\n\n" % told


def _data(event: object) -> bytes:
    return data(msgspec.json.encode(event))
