"""Files and batches on disk, within limits.

    FOLDER/lock                 held by the server that uses it
    FOLDER/files/ID             what was uploaded, or what a batch has answered
    FOLDER/files/ID.json        its StoredFile
    FOLDER/batches/ID.json      a Batch
    FOLDER/batches/ID.good      records of answers, while the batch runs; ID.bad those of errors

Everything that is told about is in memory; a change is on disk before it is told. Belongs to one event loop.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import msgspec

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.frontend.deltas import Usage
from dashinfer_vlm.server.batches.usage import NOTHING
from dashinfer_vlm.server.errors import HttpError

Clock = Callable[[], float]
Purpose = Literal["batch", "batch_output"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Outcome = Literal["failed", "completed", "expired", "cancelled"]
OPEN: frozenset[Status] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})

_NAME = re.compile(r"(file-|batch_)[0-9a-f]{32}\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """How much is kept, and for how long."""

    file_bytes: int
    total_bytes: int
    """Of all files together."""
    num_files: int
    """Also of batches."""
    seconds: float
    """How long a file, and a batch that has ended, is kept."""


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    owner: str
    """The id of the tenant that has brought it; "" on a server without keys."""
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: int
    expires_at: int


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch has failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    owner: str
    endpoint: str
    input_file_id: str
    model: str
    """What the server's engine had loaded when it was made: another one must not go on with it. It may be a path, which
    is nobody's business."""
    model_name: str | None = None
    """What clients called it; of batches that older servers made nobody knows."""
    metadata: dict[str, str] | None
    status: Status
    created_at: int
    expires_at: int
    output_seconds: int
    """How long its output is kept."""
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    num_requests: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: Usage = NOTHING
    fault: Fault | None = None
    outcome: Outcome | None = None
    """What it becomes once its files are in place; the ids of these are set with it."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_open(self) -> bool:
        return self.status in OPEN


Kept = TypeVar("Kept", StoredFile, Batch)


class Store:
    """One folder. `close` it."""

    def __init__(self, folder: Path, limits: StoreLimits, *, clock: Clock = time.time) -> None:
        """Raises ConfigError for a folder that cannot be used, or that another server uses."""
        self.limits = limits
        self._clock = clock
        self._files_folder, self._batches_folder = folder / "files", folder / "batches"
        try:
            for each in (folder, self._files_folder, self._batches_folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise ConfigError(f"--files-path {folder} cannot be used: {error.strerror}") from error
        self._files = {file.id: file for file in _read(self._files_folder, StoredFile)}
        self._batches = {batch.id: batch for batch in _read(self._batches_folder, Batch)}
        self._remove_strays()
        self._num_bytes = sum(path.stat().st_size for path in self._data())

    def close(self) -> None:
        self._lock.close()

    def now(self) -> int:
        """Unix time in whole seconds."""
        return int(self._clock())

    def take(self, num_bytes: int) -> None:
        """Count bytes that are about to be written; raises HttpError 413 where they do not fit."""
        if self._num_bytes + num_bytes > self.limits.total_bytes:
            self.sweep()
        if self._num_bytes + num_bytes > self.limits.total_bytes:
            raise HttpError(
                413,
                "storage_full",
                f"files hold {self._num_bytes} bytes, the limit is {self.limits.total_bytes}; delete some, or "
                "start the server with a larger --files-gib",
            )
        self._num_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes

    def new_upload(self) -> tuple[str, Path]:
        """An id, and where the bytes of its file go; raises HttpError 413 where there are too many files."""
        self.sweep()
        self._check_number(len(self._files), "files")
        id = self.new_file_id()
        return id, self._files_folder / id

    def new_file_id(self) -> str:
        """One that nobody can guess."""
        return _new_id("file-")

    def keep(self, file: StoredFile) -> None:
        """The bytes of `file` are there, and counted."""
        _write(self._files_folder, file)
        self._files[file.id] = file

    def path(self, file: StoredFile) -> Path:
        return self._files_folder / file.id

    def file(self, id: str, owner: str) -> StoredFile:
        """Raises HttpError 404 for one that is not there, or not the owner's."""
        self.sweep()
        return _owned(self._files, id, owner, "file")

    def files(self, owner: str) -> list[StoredFile]:
        """The newest first."""
        self.sweep()
        return _newest(self._files.values(), owner)

    def delete(self, file: StoredFile) -> None:
        """Raises HttpError 409 while a batch reads it."""
        if batch := self._reader(file):
            raise HttpError(409, "file_in_use", f"{batch.id} is still reading {file.id}; cancel it first")
        self._delete(file)

    def new_batch_id(self) -> str:
        """Raises HttpError 413 where there are too many."""
        self.sweep()
        self._check_number(len(self._batches), "batches")
        return _new_id("batch_")

    def save(self, batch: Batch) -> Batch:
        _write(self._batches_folder, batch)
        self._batches[batch.id] = batch
        return batch

    def change(self, batch: Batch, **changes: Any) -> Batch:
        """The batch as it is by now, with changes."""
        return self.save(msgspec.structs.replace(self._batches[batch.id], **changes))

    def count(self, batch: Batch, *, num_completed: int, num_failed: int, usage: Usage) -> None:
        """In memory alone: on disk, the records themselves say how many there are, and what they have cost."""
        self._batches[batch.id] = msgspec.structs.replace(
            self._batches[batch.id], num_completed=num_completed, num_failed=num_failed, usage=usage
        )

    def batch(self, id: str, owner: str) -> Batch:
        """Raises HttpError 404 for one that is not there, or not the owner's."""
        return _owned(self._batches, id, owner, "batch")

    def batches(self, owner: str) -> list[Batch]:
        """The newest first."""
        self.sweep()
        return _newest(self._batches.values(), owner)

    def open_batches(self) -> list[Batch]:
        """Everybody's, the oldest first."""
        return sorted((batch for batch in self._batches.values() if batch.is_open), key=lambda batch: batch.created_at)

    def records(self, batch: Batch) -> tuple[Path, Path]:
        """Where answers and errors are written while it runs."""
        return self._batches_folder / f"{batch.id}.good", self._batches_folder / f"{batch.id}.bad"

    def adopt(self, records: Path, id: str, filename: str, batch: Batch) -> None:
        """Make a file of what a batch has written; where it is one already, nothing happens."""
        path = self._files_folder / id
        if records.exists():
            records.replace(path)
        now = self.now()
        self.keep(
            StoredFile(
                id=id,
                owner=batch.owner,
                filename=filename,
                purpose="batch_output",
                num_bytes=path.stat().st_size,
                created_at=now,
                expires_at=now + batch.output_seconds,
            )
        )

    def sweep(self) -> None:
        """Let go of what is too old."""
        now = self._clock()
        for file in [file for file in self._files.values() if file.expires_at <= now and not self._reader(file)]:
            self._delete(file)
        for batch in [batch for batch in self._batches.values() if not batch.is_open]:
            if batch.created_at + self.limits.seconds <= now:
                del self._batches[batch.id]
                (self._batches_folder / f"{batch.id}.json").unlink(missing_ok=True)

    def _delete(self, file: StoredFile) -> None:
        del self._files[file.id]
        (self._files_folder / f"{file.id}.json").unlink(missing_ok=True)
        self.path(file).unlink(missing_ok=True)
        self.give(file.num_bytes)

    def _reader(self, file: StoredFile) -> Batch | None:
        return next((batch for batch in self.open_batches() if batch.input_file_id == file.id), None)

    def _check_number(self, number: int, what: str) -> None:
        if number >= self.limits.num_files:
            raise HttpError(
                413,
                f"too_many_{what}",
                f"there are {number} {what}, the limit is {self.limits.num_files}; delete some, or start the server "
                "with a larger --max-files",
            )

    def _data(self) -> Iterator[Path]:
        yield from (path for path in self._files_folder.iterdir() if not path.suffix)
        yield from (path for path in self._batches_folder.iterdir() if path.suffix in (".good", ".bad"))

    def _remove_strays(self) -> None:
        """What was being written when the server ended."""
        expected = {id for batch in self.open_batches() for id in (batch.output_file_id, batch.error_file_id)}
        known = self._files.keys() | self._batches.keys() | expected
        for path in [*self._data(), *self._files_folder.glob("*.new"), *self._batches_folder.glob("*.new")]:
            if path.stem not in known:
                path.unlink()
        for id in [id for id, file in self._files.items() if not self.path(file).exists()]:
            del self._files[id]
            (self._files_folder / f"{id}.json").unlink()


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def _lock(folder: Path) -> BinaryIO:
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"--files-path {folder} is used by another server; give each its own") from error
    return file


def _read(folder: Path, kind: type[Kept]) -> Iterator[Kept]:
    for path in sorted(folder.glob("*.json")):
        if _NAME.fullmatch(path.name):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=kind)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path} is no record of this version's: {error}; move it away") from error


def _write(folder: Path, kept: StoredFile | Batch) -> None:
    """Whole or not at all."""
    unfinished = folder / f"{kept.id}.new"
    unfinished.write_bytes(msgspec.json.encode(kept))
    os.replace(unfinished, folder / f"{kept.id}.json")


def _owned(kept: dict[str, Kept], id: str, owner: str, what: str) -> Kept:
    found = kept.get(id)
    if found is None or found.owner != owner:
        raise HttpError(404, f"{what}_not_found", f"there is no {what} {id[:80]!r}", param=f"{what}_id")
    return found


def _newest(kept: Iterable[Kept], owner: str) -> list[Kept]:
    mine = [each for each in kept if each.owner == owner]
    return sorted(mine, key=lambda each: (each.created_at, each.id), reverse=True)
