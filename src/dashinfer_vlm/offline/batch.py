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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import httpx
import msgspec
from fastapi import FastAPI

from dashinfer_vlm.errors import ConfigError, EngineDeadError

__all__ = ["BatchInput", "BatchOutput", "BatchRecord", "BatchRun"]

_RECORD_ID = re.compile(r"batch_req_([0-9]+)")


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
    """Why a line is no request."""

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


class BatchOutput:
    """The output file: what it holds already, and where records are appended, each in one write."""

    def __init__(self, path: Path) -> None:
        """Lock `path` and drop a last line that was cut off by a kill. Raises ConfigError."""
        self.path = path
        self._file = _open_locked(path)
        self.done: dict[int, str | None] = {}
        """Custom ids of the records that are there, by the number of their input line."""
        try:
            self._read()
        except ConfigError:
            self._file.close()
            raise

    def write(self, record: BatchRecord) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")

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

    def open_lines(self, done: dict[int, str | None]) -> Iterator[tuple[int, BatchRequest | BatchRecord]]:
        """Numbered lines that are not `done`: requests, or for lines that are none, the record that says why.

        Raises ConfigError when what is done belongs to another input.
        """
        seen: set[str] = set()
        left = set(done)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                parsed = _parse(number, line, seen)
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
        output: BatchOutput,
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

    async def run(self, source: BatchInput) -> None:
        """Raises EngineDeadError when the engine ends; lines that it did not answer stay open."""
        try:
            for number, line in source.open_lines(self._output.done):
                if len(self._pending) >= self._window:
                    await self._settle(asyncio.FIRST_COMPLETED)
                self._pending.add(asyncio.create_task(self._answer(number, line)))
            await self._settle(asyncio.ALL_COMPLETED)
        finally:
            for task in self._pending:
                task.cancel()
            await asyncio.gather(*self._pending, return_exceptions=True)
            await self._client.aclose()

    async def _settle(self, when: str) -> None:
        while self._pending:
            done, self._pending = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._keep(task.result())
            if when == asyncio.FIRST_COMPLETED:
                return

    def _keep(self, record: BatchRecord) -> None:
        if not self._is_alive():
            raise EngineDeadError("the engine has stopped; run the same command again to go on")
        self._output.write(record)
        self._on_record(record)

    async def _answer(self, number: int, line: BatchRequest | BatchRecord) -> BatchRecord:
        if isinstance(line, BatchRecord):
            return line
        headers = {"content-type": "application/json"}
        reply = await self._client.post(line.url, content=bytes(line.body), headers=headers)
        response = BatchResponse(reply.status_code, f"req_{number}", msgspec.Raw(reply.content))
        return BatchRecord(id=_record_id(number), custom_id=line.custom_id, response=response)


def _parse(number: int, line: bytes, seen: set[str]) -> BatchRequest | BatchRecord:
    """The request in a line; `seen` has the custom ids so far, and gets this one."""
    try:
        request = msgspec.json.decode(line, type=BatchRequest)
        streams = msgspec.json.decode(request.body, type=_Streams).stream
    except msgspec.DecodeError as error:
        return _refused(number, None, f"this line is no request of a batch: {error}")
    if request.custom_id in seen:
        return _refused(number, request.custom_id, "an earlier line has the same custom_id")
    seen.add(request.custom_id)
    if request.method != "POST" or not request.url.startswith("/v1/"):
        reason = f"{request.method} {request.url} is no request of a batch; POST to /v1/chat/completions, for example"
        return _refused(number, request.custom_id, reason)
    if streams:
        return _refused(number, request.custom_id, "stream is set; answers of a batch are whole")
    return request


def _refused(number: int, custom_id: str | None, message: str) -> BatchRecord:
    return BatchRecord(id=_record_id(number), custom_id=custom_id, error=BatchError("invalid_request", message))


def _record_id(number: int) -> str:
    return f"batch_req_{number}"


_HINT = "name another output, or delete this one"
