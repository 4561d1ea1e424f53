"""Batch files: JSON Lines of requests in, JSON Lines of responses out, in the format of OpenAI's Batch API.

Each line is answered by the HTTP application itself, without a socket, so that it gets what a server would answer.
A response stands in the output as soon as it is there, in any order; the number of its input line is in its `id`
("batch_req_17"). What stands there is not asked again, so that a run which was killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import httpx
import msgspec
from fastapi import FastAPI

from dashinfer_vlm.errors import ConfigError, DashInferError, EngineDeadError

__all__ = ["BatchInput", "BatchOutput", "BatchRecord", "BatchRun", "BatchSink", "BatchSource"]

T = TypeVar("T")

_RECORD_ID = re.compile(r"batch_req_([0-9]+)")
_HINT = "name another output, or delete this one"


class BatchRequest(msgspec.Struct, frozen=True):
    """One input line."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class BatchResponse(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, frozen=True):
    """Why a line is not a request."""

    code: str
    message: str


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One output line."""

    id: str
    custom_id: str | None
    response: BatchResponse | None = None
    error: BatchError | None = None

    @property
    def is_good(self) -> bool:
        return self.response is not None and self.response.status_code == 200


class _Done(msgspec.Struct, frozen=True):
    id: str
    custom_id: str | None


class _Streams(msgspec.Struct, frozen=True):
    stream: object = None


Line = tuple[int, BatchRequest | BatchRecord]
"""Its number, and the request in it; where it is none, the record that says why."""


class BatchSource(Protocol):
    """Where requests come from: a file, or a pipe."""

    @property
    def num_lines(self) -> int | None:
        """None where nobody can know, and where a run cannot go on after its end."""
        ...

    def check(self, done: dict[int, str | None]) -> None:
        """Raise ConfigError when what is done cannot be its own; waits for no line."""
        ...

    def open_lines(self, done: dict[int, str | None]) -> Iterator[Line]:
        """Lines that are not `done`, for which it may wait. Raises as `check` does."""
        ...


class BatchSink(Protocol):
    """Where records go: a file, or a pipe."""

    @property
    def name(self) -> str: ...

    @property
    def can_resume(self) -> bool:
        """Whether another run can find what is there."""
        ...

    @property
    def done(self) -> dict[int, str | None]:
        """Custom ids of the records that are there, by the number of their input line."""
        ...

    def write(self, record: BatchRecord) -> None: ...

    def close(self) -> None: ...


class BatchOutput:
    """The output file: what it holds already, and where records are appended, each in one write."""

    can_resume = True

    def __init__(self, path: Path) -> None:
        """Lock `path` and drop a last line that was cut off by a kill. Raises ConfigError."""
        self.path, self.name = path, str(path)
        self._file = _open_locked(path)
        self.done: dict[int, str | None] = {}
        """Custom ids of the records that are there, by the number of their input line."""
        try:
            self._read()
        except ConfigError:
            self._file.close()
            raise

    def write(self, record: BatchRecord) -> None:
        self._file.write(encoded(record))

    def close(self) -> None:
        """Give the file up, on disk as it is."""
        if not self._file.closed:
            os.fsync(self._file)
            self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as reader:
            end = 0
            for line in reader:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                number, custom_id = self._record_of(line)
                self.done[number] = custom_id
        self._file.truncate(end)

    def _record_of(self, line: bytes) -> tuple[int, str | None]:
        try:
            record = msgspec.json.decode(line, type=_Done)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self.path} holds something else than answers of a batch: {error}") from error
        match = _RECORD_ID.fullmatch(record.id)
        if match is None:
            raise ConfigError(f"{self.path} holds the record {record.id!r}, which no batch of ours has written")
        return int(match[1]), record.custom_id


def _open_locked(path: Path) -> BinaryIO:
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"{path} is being written by another run") from error
    return file


class BatchInput:
    """The input file, read line by line."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.num_lines = sum(1 for line in file if line.strip())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error

    def check(self, done: dict[int, str | None]) -> None:
        """Raise ConfigError when what is done belongs to another input."""
        for _ in self.open_lines(done):
            pass

    def open_lines(self, done: dict[int, str | None]) -> Iterator[Line]:
        """Lines that are not `done`; raises ConfigError when what is done belongs to another input."""
        left = set(done)
        with self.path.open("rb") as file:
            for number, parsed in numbered_lines(file):
                if number in left:
                    left.remove(number)
                    self._check_same(number, parsed.custom_id, done[number])
                else:
                    yield number, parsed
        if left:
            raise ConfigError(f"the output answers line {min(left)}, which {self.path} does not have: {_HINT}")

    def _check_same(self, number: int, custom_id: str | None, done: str | None) -> None:
        if custom_id != done:
            raise ConfigError(
                f"the output answers {done!r} in line {number}, where {self.path} has {custom_id!r}: {_HINT}"
            )


class BatchRun:
    """Answers the open lines of an input, several at a time."""

    def __init__(
        self,
        app: FastAPI,
        output: BatchSink,
        *,
        window: int,
        is_alive: Callable[[], bool],
        on_record: Callable[[BatchRecord], None],
    ) -> None:
        """`window` requests run at once; `on_record` hears of each record once it is written."""
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
                if reading and len(self._pending) < self._window:
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
        headers = {"content-type": "application/json"}
        reply = await self._client.post(line.url, content=bytes(line.body), headers=headers)
        response = BatchResponse(reply.status_code, f"req_{number}", msgspec.Raw(reply.content))
        return BatchRecord(id=_record_id(number), custom_id=line.custom_id, response=response)


def _engine_died(source: BatchSource, output: BatchSink) -> str:
    can_resume = source.num_lines is not None and output.can_resume
    return "the engine has stopped" + ("; run the same command again to go on" if can_resume else "")


def numbered_lines(file: Iterable[bytes]) -> Iterator[Line]:
    """What the lines of a batch say; blank ones count, but say nothing."""
    seen: set[str] = set()
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _parse(number, line, seen)


def encoded(record: BatchRecord) -> bytes:
    """A line of output."""
    return msgspec.json.encode(record) + b"\n"


def _parse(number: int, line: bytes, seen: set[str]) -> BatchRequest | BatchRecord:
    """The request in a line; `seen` has the custom ids so far, and gets this one."""
    try:
        request = msgspec.json.decode(line, type=BatchRequest)
        streams = msgspec.json.decode(request.body, type=_Streams).stream
    except msgspec.DecodeError as error:
        return _refused(number, None, f"this line is not a batch request: {error}")
    if request.custom_id in seen:
        return _refused(number, request.custom_id, "an earlier line has the same custom_id")
    seen.add(request.custom_id)
    if request.method != "POST" or not request.url.startswith("/v1/"):
        reason = f"{request.method} {request.url} is not a batch request; POST to /v1/chat/completions, for example"
        return _refused(number, request.custom_id, reason)
    if streams:
        return _refused(number, request.custom_id, "stream is set; answers of a batch are whole")
    return request


def _refused(number: int, custom_id: str | None, message: str) -> BatchRecord:
    return BatchRecord(id=_record_id(number), custom_id=custom_id, error=BatchError("invalid_request", message))


def _record_id(number: int) -> str:
    return f"batch_req_{number}"


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
