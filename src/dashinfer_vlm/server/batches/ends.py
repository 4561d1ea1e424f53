"""The two ends of a batch on disk: the file of requests, and the one to which their answers are appended.

A response stands in the output as soon as it is there, in any order; the number of its input line ends its `id`. What
stands there is not asked again, so that a run which was killed goes on where it was.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.batches.lines import BatchRecord, Line, encoded, filled_lines, line_number, numbered_lines
from dashinfer_vlm.server.batches.usage import NOTHING, plus, usage_of

__all__ = ["BatchInput", "BatchOutput", "BatchSink", "BatchSource"]

_HINT = "name another output, or delete this one"


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


class _DoneResponse(msgspec.Struct, frozen=True):
    body: msgspec.Raw


class _Done(msgspec.Struct, frozen=True):
    id: str
    custom_id: str | None
    response: _DoneResponse | None = None


class BatchOutput:
    """The output file: what it holds already, and where records are appended."""

    can_resume = True

    def __init__(self, path: Path) -> None:
        """Lock `path` and drop a last line that was cut off by a kill. Raises ConfigError."""
        self.path, self.name = path, str(path)
        self._file = _open_locked(path)
        self.done: dict[int, str | None] = {}
        """Custom ids of the records that are there, by the number of their input line."""
        self.usage = NOTHING
        """Of the answers that were there."""
        try:
            self._read()
        except ConfigError:
            self._file.close()
            raise

    def write(self, record: BatchRecord) -> None:
        self.append(encoded(record))

    def append(self, line: bytes) -> None:
        """A record as `encoded`."""
        while line:  # a disk that is nearly full takes a part
            line = line[self._file.write(line) :]

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
                number, record = self._record_of(line)
                self.done[number] = record.custom_id
                if record.response is not None:
                    self.usage = plus(self.usage, usage_of(record.response.body))
        self._file.truncate(end)

    def _record_of(self, line: bytes) -> tuple[int, _Done]:
        try:
            record = msgspec.json.decode(line, type=_Done)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self.path} holds something else than answers of a batch: {error}") from error
        number = line_number(record.id)
        if number is None:
            raise ConfigError(f"{self.path} holds the record {record.id!r}, which no batch of ours has written")
        return number, record


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

    def __init__(self, path: Path, *, url: str | None = None) -> None:
        """With `url`, all requests must be to it. Raises ConfigError for a file that cannot be read."""
        self.path = path
        self._url = url
        try:
            with path.open("rb") as file:
                self.num_lines = sum(1 for _ in filled_lines(file))
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
            for number, parsed in numbered_lines(file, self._url):
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
