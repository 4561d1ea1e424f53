"""Server-sent events that end what they show when the client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dashinfer_vlm.server.errors import reply_to

DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends `events`, then `[DONE]`; an error on the way is sent as an event and ends the stream without it.

    `close` is called when the response is over, however it ended and also if it never began.
    """

    def __init__(self, events: AsyncIterator[msgspec.Struct], close: Callable[[], None]) -> None:
        # proxies must not collect the events
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_encode(events), media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _encode(events: AsyncIterator[msgspec.Struct]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    except Exception as error:  # noqa: BLE001  the status is sent already, so the stream itself must tell
        yield b"data: " + reply_to(error).body + b"\n\n"
        return
    yield DONE
