"""Responses that are kept, for whoever asks for them again or goes on with them: SQLite, in a file or in memory.

A tenant sees its own alone. Bounded by bytes and by number: the conversation that was gone on with least recently goes
first, its newest response before those that it stands on.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from dashinfer_vlm.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

MAX_RESPONSES = 100_000
_FORMAT = 1
"""Of the table, in SQLite's `user_version`."""
_ROW_BYTES = 512
"""What SQLite and the ids of a response take beside its texts, about."""
_TABLE = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    previous TEXT,
    input BLOB NOT NULL,
    reply BLOB NOT NULL,
    size INTEGER NOT NULL,
    used INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON responses (used);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One response."""

    id: str
    previous: str | None
    """The id of the response that it goes on with."""
    input: bytes
    """The items of its own input, a JSON list."""
    reply: bytes
    """The response as JSON."""

    @property
    def size(self) -> int:
        return len(self.input) + len(self.reply) + _ROW_BYTES


class ResponseStore:
    """All methods but `open` run in a thread of their own, one after another."""

    def __init__(self, database: sqlite3.Connection, max_bytes: int, max_responses: int) -> None:
        self.max_bytes = max_bytes
        self._max_responses = max_responses
        self._database = database
        self._thread = ThreadPoolExecutor(1, "responses")
        self._count, self._size, self._used = self._measured()

    @classmethod
    def open(cls, path: str | None, max_bytes: int, max_responses: int = MAX_RESPONSES) -> ResponseStore:
        """In the file `path`, which is made for its owner alone where it is not there, else in memory.

        Raises ConfigError for a file that is no such store, or that another server has opened.
        """
        try:
            return cls(_connected(path), max_bytes, max_responses)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--responses-store {path} cannot be used: {error}") from error

    async def put(self, tenant: str, kept: Kept) -> None:
        """Keep it, and let go of what there is no more room for."""
        await self._run(self._put, tenant, kept)

    async def get(self, tenant: str, id: str) -> Kept | None:
        return await self._run(self._get, tenant, id)

    async def chain(self, tenant: str, id: str) -> list[Kept]:
        """The response and those that it stands on, the first one first; raises KeyError with the id that is gone."""
        return await self._run(self._chain, tenant, id)

    async def delete(self, tenant: str, id: str) -> bool:
        """Whether it was there."""
        return await self._run(self._delete, tenant, id)

    async def close(self) -> None:
        await self._run(self._database.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **options))

    def _measured(self) -> tuple[int, int, int]:
        count, size, used = self._database.execute("SELECT count(*), total(size), max(used) FROM responses").fetchone()
        return count, int(size), used or 0

    def _put(self, tenant: str, kept: Kept) -> None:
        try:
            with self._database:
                row = (kept.id, tenant, kept.previous, kept.input, kept.reply, kept.size, 0)
                self._database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._count, self._size = self._count + 1, self._size + kept.size
                self._touch(tenant, kept.id)
                self._make_room()
        except sqlite3.Error:  # a full disk: nothing of it has happened
            self._count, self._size, self._used = self._measured()
            raise

    def _touch(self, tenant: str, id: str | None) -> None:
        """Mark a response and all that it stands on as used, itself first."""
        while id is not None:
            self._used += 1
            self._database.execute("UPDATE responses SET used = ? WHERE id = ?", (self._used, id))
            kept = self._get(tenant, id)
            id = kept.previous if kept else None

    def _make_room(self) -> None:
        while self._count > self._max_responses or self._size > self.max_bytes:
            id, size = self._database.execute("SELECT id, size FROM responses ORDER BY used LIMIT 1").fetchone()
            self._drop(id, size)

    def _drop(self, id: str, size: int) -> None:
        self._database.execute("DELETE FROM responses WHERE id = ?", (id,))
        self._count, self._size = self._count - 1, self._size - size

    def _get(self, tenant: str, id: str) -> Kept | None:
        row = self._database.execute(
            "SELECT id, previous, input, reply FROM responses WHERE id = ? AND tenant = ?", (id, tenant)
        ).fetchone()
        return row and Kept(id=row[0], previous=row[1], input=row[2], reply=row[3])

    def _chain(self, tenant: str, id: str) -> list[Kept]:
        found: list[Kept] = []
        at: str | None = id
        while at is not None:
            kept = self._get(tenant, at)
            if kept is None:
                raise KeyError(at)
            found.append(kept)
            at = kept.previous
        return found[::-1]

    def _delete(self, tenant: str, id: str) -> bool:
        kept = self._get(tenant, id)
        if kept is not None:
            with self._database:
                self._drop(id, kept.size)
        return kept is not None


def _connected(path: str | None) -> sqlite3.Connection:
    if path is not None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    database = sqlite3.connect(path or ":memory:", timeout=0, check_same_thread=False)
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON"):
        database.execute(f"PRAGMA {pragma}")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (version, tables > 0) not in ((0, False), (_FORMAT, True)):
        raise sqlite3.DatabaseError("it holds something else, or was written by another version")
    database.executescript(f"BEGIN EXCLUSIVE; {_TABLE} PRAGMA user_version = {_FORMAT}; COMMIT;")
    return database
