"""Bodies as they come from the socket: none of them larger, slower or more intricate than a limit, all of them together
within a budget.

What a parser makes of a body costs far more than its bytes: an object takes as long as ten thousand characters of a
picture, and nothing else runs meanwhile. So the structure of a body is counted before it is parsed.
"""

from __future__ import annotations

import asyncio
import time
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Iterator

from fastapi import Request

from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.server.errors import HttpError

MAX_OBJECTS = 4096
"""About 20 ms of validation; a turn is one, a picture two."""
MAX_VALUES = 150_000
"""Numbers, strings and the like; about 15 ms."""
_BYTES_PER_S = 1 << 16
"""The slowest that a body may come."""
_SHORT_BYTES = 1 << 14
"""What is counted at once; larger bodies are counted in a thread."""
_MAX_DISCARDED_BYTES = 2**30
"""A client that is told 413 only hears it once its body has been taken; beyond this it is cut off."""
_BUDGET_BODIES = 16
"""Largest bodies whose bytes, or what was parsed of them, are held at a time."""
_HELD = "dashinfer.body"
"""The key of the ASGI scope that holds the Held of a request."""
_WINDOW_BYTES = 1 << 20


class Held:
    """What one body takes of the budget, until `close`, which may be called again."""

    def __init__(self, reader: BodyReader) -> None:
        self._reader = reader
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Take `num_bytes` more; raises OverloadedError."""
        self._reader.take(num_bytes)
        self.num_bytes += num_bytes

    def close(self) -> None:
        num_bytes, self.num_bytes = self.num_bytes, 0
        self._reader.give_back(num_bytes)


def forget_body(request: Request) -> None:
    """What the body said is not held any more: its pictures are loaded, its text is tokens."""
    held: Held | None = request.scope.get(_HELD)
    if held is not None:
        held.close()


def hold(request: Request, num_bytes: int) -> None:
    """Count more that is held for a request, until `forget_body` or the end of its task; raises OverloadedError."""
    held: Held = request.scope[_HELD]
    held.grow(num_bytes)


class BodyReader:
    """Reads the bodies of all requests of one server."""

    def __init__(self, max_bytes: int, *, start_s: float = 30.0) -> None:
        """`max_bytes` is the most of one body; all that are held may have 16 times as much together.

        A body may take `start_s`, and one second more for every 64 KiB of it.
        """
        self.max_bytes = max_bytes
        self._start_s = start_s
        self._budget = _BUDGET_BODIES * max_bytes
        self._num_held = 0

    async def read(self, request: Request) -> bytes:
        """The body, which counts as held until `forget_body`, or the end of the request's task.

        Raises HttpError 408, 413 or 400 for one that is too slow, large or intricate; OverloadedError.
        """
        chunks: list[bytes] = []
        request.scope[_HELD] = held = Held(self)
        task = asyncio.current_task()
        assert task is not None, "read() belongs to the task of a request"
        task.add_done_callback(lambda _: held.close())
        await self._fill(chunks, request, held)
        if held.num_bytes <= _SHORT_BYTES:
            return _checked(chunks)
        return await asyncio.to_thread(_checked, chunks)

    def take(self, num_bytes: int) -> None:
        """Raises OverloadedError for more than the budget has left."""
        if self._num_held + num_bytes > self._budget:
            raise OverloadedError(
                f"the bodies of requests hold {self._num_held} bytes, the limit is {self._budget}; try again later",
                reason="bodies",
            )
        self._num_held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._num_held -= num_bytes

    async def arriving(
        self, request: Request, max_bytes: int, flag: str = "--max-body-mib"
    ) -> AsyncIterator[bytes | None]:
        """The body as it comes; None once there is more than `max_bytes` of it, and nothing from then on.

        Raises HttpError 400 for one that is packed, 408 for one that is too slow, and behind the end of one that is too
        large 413, which names the `flag` that sets the limit.
        """
        _check_not_packed(request)
        started_s, num_bytes = time.monotonic(), 0
        stream = aiter(request.stream())
        while num_bytes <= _MAX_DISCARDED_BYTES + max_bytes:
            left_s = started_s + self._start_s + num_bytes / _BYTES_PER_S - time.monotonic()
            try:
                chunk = await asyncio.wait_for(anext(stream), left_s)
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                raise _too_slow(num_bytes) from None
            num_bytes += len(chunk)
            if num_bytes <= max_bytes:
                yield chunk
            elif num_bytes - len(chunk) <= max_bytes:
                yield None
        if num_bytes > max_bytes:
            raise HttpError(
                413,
                "body_too_large",
                f"the body has more than {max_bytes} bytes, the limit; send less or start with {flag}",
            )

    async def _fill(self, chunks: list[bytes], request: Request, held: Held) -> None:
        async for chunk in self.arriving(request, self.max_bytes):
            if chunk is None:
                held.close()
                chunks.clear()
            else:
                held.grow(len(chunk))
                chunks.append(chunk)


def _check_not_packed(request: Request) -> None:
    packing = request.headers.get("content-encoding", "identity")
    if packing.lower() != "identity":
        raise HttpError(400, "unsupported", f"the body is packed ({packing[:40]}); send it without Content-Encoding")


def _checked(chunks: list[bytes]) -> bytes:
    body = b"".join(chunks).removeprefix(BOM_UTF8)  # RFC 8259 forbids to send one and allows to ignore it
    check_structure(body)
    return body


def check_structure(body: bytes) -> None:
    """Raise HttpError 400 for more objects or values than can be validated without a pause for everyone else."""
    num_objects = num_values = 0
    for begin, end in _outside_strings(body):
        num_objects += body.count(b"{", begin, end)
        num_values += 1 + body.count(b",", begin, end)
        if num_objects > MAX_OBJECTS:
            raise _too_many("objects, such as messages and their parts", MAX_OBJECTS)
        if num_values > MAX_VALUES:
            raise _too_many("values", MAX_VALUES)


def _outside_strings(body: bytes) -> Iterator[tuple[int, int]]:
    """The ranges between the strings of a JSON text, none of them long."""
    at = 0
    while (quote := body.find(b'"', at)) >= 0:
        yield from _windows(at, quote)
        at = _end_of_string(body, quote + 1)
    yield from _windows(at, len(body))


def _end_of_string(body: bytes, at: int) -> int:
    """The place behind the string that begins at `at`."""
    while (quote := body.find(b'"', at)) >= 0:
        text = body[max(at, quote - 1) : quote]
        if not text.endswith(b"\\"):
            return quote + 1
        text = body[at:quote]
        at = quote + 1
        if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:
            return at
    return len(body)


def _windows(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, _WINDOW_BYTES):
        yield at, min(at + _WINDOW_BYTES, end)


def _too_many(things: str, most: int) -> HttpError:
    return HttpError(400, "too_many_values", f"the body has more than {most} {things}; send less")


def _too_slow(num_bytes: int) -> HttpError:
    message = f"the body did not come in time, only {num_bytes} bytes of it; send it faster"
    return HttpError(408, "request_timeout", message, headers={"Connection": "close"})
