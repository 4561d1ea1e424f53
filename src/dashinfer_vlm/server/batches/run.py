"""A batch run: the open lines of its input, answered by the HTTP application itself, without a socket, so that each
gets what a server would answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, TypeVar

import httpx
import msgspec
from starlette.types import ASGIApp

from dashinfer_vlm.errors import DashInferError, EngineDeadError
from dashinfer_vlm.server.batches.ends import BatchSink, BatchSource
from dashinfer_vlm.server.batches.lines import BatchRecord, BatchRequest, BatchResponse, Line, record_id

__all__ = ["BatchRun"]

T = TypeVar("T")

_RETRY_S = 1.0


class BatchRun:
    """Answers the open lines of an input, several at a time."""

    def __init__(
        self,
        app: ASGIApp,
        output: BatchSink,
        *,
        window: Callable[[], int],
        is_alive: Callable[[], bool],
        on_record: Callable[[BatchRecord], None],
    ) -> None:
        """As many requests run at once as `window` says at the time; `on_record` hears of each record once it is
        written."""
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None)
        self._output = output
        self._window = window
        self._is_alive = is_alive
        self._on_record = on_record
        self._pending: set[asyncio.Task[BatchRecord]] = set()

    async def run(self, source: BatchSource) -> None:
        """Raises EngineDeadError when the engine ends; lines that it did not answer stay open."""
        lines = source.open_lines(self._output.done)
        reading: asyncio.Future[Line | None] | None = _next_of(lines)
        try:
            while reading or self._pending:
                awaited: set[asyncio.Future[Any]] = {*self._pending}
                if reading and len(self._pending) < self._window():
                    awaited.add(reading)
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if not self._is_alive():
                    raise EngineDeadError(_engine_died(source, self._output))
                self._keep_answered()
                if reading and reading in awaited and reading.done():
                    reading = self._take(reading.result(), lines)
        finally:
            for task in self._pending:
                task.cancel()
            await asyncio.gather(*self._pending, return_exceptions=True)
            await self._client.aclose()

    def _take(self, line: Line | None, lines: Iterator[Line]) -> asyncio.Future[Line | None] | None:
        """Begin to answer `line`, and to read the next one; None at the end."""
        if line is None:
            return None
        self._pending.add(asyncio.create_task(self._answer(*line)))
        return _next_of(lines)

    def _keep_answered(self) -> None:
        for task in [task for task in self._pending if task.done()]:
            self._pending.remove(task)
            record = task.result()
            self._output.write(record)
            self._on_record(record)

    async def _answer(self, number: int, line: BatchRequest | BatchRecord) -> BatchRecord:
        if isinstance(line, BatchRecord):
            return line
        reply = await self._ask(line)
        while self._is_alive() and (wait_s := _seconds_to_wait(reply)) is not None:
            await asyncio.sleep(wait_s)
            reply = await self._ask(line)
        response = BatchResponse(reply.status_code, reply.headers.get("x-request-id", ""), msgspec.Raw(reply.content))
        return BatchRecord(id=record_id(number), custom_id=line.custom_id, response=response)

    async def _ask(self, line: BatchRequest) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return await self._client.post(line.url, content=bytes(line.body), headers=headers)


def _seconds_to_wait(reply: httpx.Response) -> float | None:
    """When to ask again a server that is full, or has no engine for a while; None for one that has answered."""
    if "retry-after" in reply.headers:
        return float(reply.headers["retry-after"])
    return _RETRY_S if reply.status_code == HTTPStatus.SERVICE_UNAVAILABLE else None


def _engine_died(source: BatchSource, output: BatchSink) -> str:
    can_resume = source.num_lines is not None and output.can_resume
    return "the engine has stopped" + ("; run the same command again to go on" if can_resume else "")


def _next_of(items: Iterator[T]) -> asyncio.Future[T | None]:
    """The next of `items`, None at their end. It is awaited in a thread that the end of the program does not wait for:
    a pipe may stay silent forever."""
    found: Future[T | None] = Future()
    found.set_running_or_notify_cancel()  # nobody can cancel it any more: the thread sets it

    def read() -> None:
        try:
            found.set_result(next(items, None))
        except (DashInferError, OSError) as error:
            found.set_exception(error)

    threading.Thread(target=read, name="batch-input", daemon=True).start()
    return asyncio.wrap_future(found)
