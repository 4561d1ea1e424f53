"""Server-sent events that end what they show when the client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dashinfer_vlm.server.errors import reply_to

DONE = b"data: [DONE]\n\n"


class NamedEvent(Protocol):
    """A struct that says what it is."""

    @property
    def type(self) -> str: ...


class EventStream(StreamingResponse):
    """Sends `lines`, each of which is one or more whole events (`until_done`, `by_type`).

    `close` is called when the response is over, however it ended and also if it never began.
    """

    def __init__(self, lines: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        # proxies must not collect the events
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def until_done(news: AsyncIterator[Sequence[msgspec.Struct]]) -> AsyncIterator[bytes]:
    """Events without names, those that come together in one piece, then `[DONE]`; an error on the way is an event too
    and ends the stream without it."""
    try:
        async for events in news:
            if events:
                yield b"".join(map(_data, events))
    except Exception as error:  # noqa: BLE001  the status is sent already, so the stream itself must tell
        yield b"data: " + reply_to(error).body + b"\n\n"
        return
    yield DONE


async def by_type(news: AsyncIterator[Sequence[NamedEvent]]) -> AsyncIterator[bytes]:
    """Events named after their `type`, those that come together in one piece. They tell their errors themselves, and
    the last one that it is the last."""
    async for events in news:
        if events:
            yield b"".join(b"event: " + event.type.encode() + b"\n" + _data(event) for event in events)


def _data(event: object) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"
