"""A real HTTP server on loopback whose answers a test writes itself, byte for byte where it must."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio

from dashinfer_vlm.media.loader import MediaLoader

Route = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
PictureMaker = Callable[..., bytes]
LoaderMaker = Callable[..., MediaLoader]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until the code under test has come so far."""
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - it has no event to wait for, and there is no time to wait
            await asyncio.sleep(0)


class Site:
    """A server on loopback whose paths are answered by routes; it remembers what it was asked."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def serve(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Answer `path` with `body`; underscores in header names stand for dashes."""

        async def route(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            fields = {"content-length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
            writer.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body)

        self.routes[path] = route
        return self.url(path)

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            path = head[0].split(" ")[1]
            fields = (line.partition(": ") for line in head[1:] if line)
            self.requests.append((path, {name.lower(): value for name, _, value in fields}))
            await self.routes[path](reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left, which is what some tests want
        finally:
            writer.close()
