"""One client's connection: uvicorn's, with bounds on how long a client may say nothing, read nothing, or half of it.

uvicorn offers a time-out between requests only. A client that connects and stays silent, sends half of its headers, or
does not read its answer would hold a file descriptor, and an answer, forever.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dashinfer_vlm.server.outlet import Chunks, Outlet

HEADERS_S = 20.0
"""How long the headers of a request may take, the first one's from when the client has connected."""
WRITE_S = 60.0
"""How long a client may leave what was sent to it unread, once the buffers are full."""
_RESERVED_FILES = 256
"""Descriptors that are not for connections: models, media, shared memory, processes."""


class Connection(H11Protocol):
    """Closes itself when its client is too slow; where too many are open, the one that has been idle longest goes."""

    headers_s = HEADERS_S
    write_s = WRITE_S
    max_connections = 1 << 20

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: Chunks = Chunks(h11.SERVER)
        self.idle_since_s = 0.0
        """When it was opened or its latest answer was complete, on the loop's clock."""
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_amid_answer(self) -> bool:
        """Whether a part of an answer has been sent, and not its end."""
        return not self.is_idle and self.cycle.response_started

    @property
    def may_go(self) -> bool:
        """Whether its end would free a file and hurt nobody."""
        return self.is_idle and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Quiet(transport))  # type: ignore[arg-type]  # a transport in all that is used of it
        self.app_state = Outlet(self.conn, transport, self.flow).added(self.app_state)
        self.idle_since_s = self.loop.time()
        self._headers_timer = self.loop.call_later(self.headers_s, transport.abort)
        if len(self.connections) > self.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle:
            self._stop_headers_timer()
        elif self._headers_timer is None:  # the beginning of another request
            self._headers_timer = self.loop.call_later(self.headers_s, self.transport.abort)

    def on_response_complete(self) -> None:
        self.idle_since_s = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._write_timer or self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_headers_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """An answer that has begun cannot become another one, so the connection just ends."""
        if self.is_idle or not self.cycle.response_started:
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _stop_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _make_room(self) -> None:
        """Let go of an idle connection, or of this one where all others are busy; one that is gone already makes
        none."""
        idle = (other for other in self.connections if isinstance(other, Connection) and other.may_go)
        oldest = min(idle, key=lambda other: other.idle_since_s, default=self)
        oldest.transport.abort()


class _Quiet:
    """A transport that is not written to once it closes. Whoever streams learns a turn of the event loop later that the
    client is gone; until then asyncio would log a warning for what it drops."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def raise_file_limit() -> int:
    """Let this process open as many files as it may, and return for how many connections that is enough."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - _RESERVED_FILES)
