"""The short way from an answer that is being streamed to its client's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import h11
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl

__all__ = ["Chunks", "Outlet"]

News = TypeVar("News")

_KEY = "dashinfer.outlet"


class Chunks(h11.Connection):
    """Knows how its answer is framed."""

    in_chunks = False
    """Whether the parts of the answer that has been begun last go out as chunks."""

    def send(self, event: h11.Event) -> Any:
        sent = super().send(event)
        if type(event) is h11.Response and sent is not None:
            self.in_chunks = b"\r\ntransfer-encoding: chunked\r\n" in sent.lower()
        return sent


class Outlet:
    """Writes parts of the answer that a connection is in the middle of. Middleware does not see them, and this server's
    need not: it looks at an answer's beginning and end alone."""

    def __init__(self, conn: Chunks, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._conn = conn
        self._transport = transport
        self._flow = flow

    @staticmethod
    def of(scope: Scope) -> Outlet | None:
        """Of the connection that a request came by; None where it came by none that has one."""
        outlet: Outlet | None = scope.get("state", {}).get(_KEY)
        return outlet

    def added(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state`, of which every request's scope gets a copy, with this."""
        return {**state, _KEY: self}

    def offer(self, news: News, written: Callable[[News], bytes]) -> bool:
        """Send what is `written` of `news` as a part of the answer, between what is awaited of `send` before and after.

        False, and nothing is written, where the client does not read what comes or cannot be sent parts of any length.
        """
        if not self._conn.in_chunks or self._flow.write_paused or self._transport.is_closing():
            return False
        if data := written(news):  # an empty chunk would be the last
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True
