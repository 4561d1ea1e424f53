"""The store of responses: its bounds, its order, its file."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.responses.store import Kept, ResponseStore


def kept(id: str, previous: str | None = None, num_bytes: int = 100) -> Kept:
    return Kept(id=id, previous=previous, input=b"[]", reply=b"x" * num_bytes)


@asynccontextmanager
async def opened(path: Path | None = None, max_bytes: int = 2**20, **bounds: int) -> AsyncIterator[ResponseStore]:
    store = ResponseStore.open(str(path) if path else None, max_bytes, **bounds)
    try:
        yield store
    finally:
        await store.close()


async def test_what_is_put_is_got_by_its_tenant_alone() -> None:
    async with opened() as store:
        await store.put("me", kept("a"))
        assert await store.get("me", "a") == kept("a")
        assert await store.get("you", "a") is None
        assert not await store.delete("you", "a")
        assert await store.delete("me", "a")
        assert await store.get("me", "a") is None


async def test_a_chain_is_told_from_its_beginning() -> None:
    async with opened() as store:
        for each in (kept("a"), kept("b", "a"), kept("c", "b")):
            await store.put("me", each)
        assert [each.id for each in await store.chain("me", "c")] == ["a", "b", "c"]
        await store.delete("me", "b")
        with pytest.raises(KeyError, match="b"):
            await store.chain("me", "c")


async def test_the_conversation_that_nobody_went_on_with_goes_first_and_its_end_before_its_beginning() -> None:
    size = kept("a").size
    async with opened(max_bytes=5 * size) as store:
        for each in (kept("a"), kept("b"), kept("a2", "a"), kept("b2", "b"), kept("a3", "a2")):
            await store.put("me", each)
        gone = []
        for number in range(5):
            await store.put("me", kept(f"new{number}"))
            gone += [id for id in ("a", "b", "a2", "b2", "a3") if id not in gone and not await store.get("me", id)]
        assert gone == ["b2", "b", "a3", "a2", "a"]
        assert await store.get("me", "new4")


async def test_the_number_of_responses_is_bounded_too() -> None:
    async with opened(max_responses=3) as store:
        for id in "abcde":
            await store.put("me", kept(id))
        assert [id for id in "abcde" if await store.get("me", id)] == ["c", "d", "e"]


async def test_a_file_keeps_its_bounds_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with opened(path) as store:
        await store.put("me", kept("a"))
        await store.put("me", kept("b"))
    assert path.stat().st_mode & 0o777 == 0o600
    async with opened(path, max_bytes=2 * kept("a").size) as store:
        await store.put("me", kept("c"))
        assert [id for id in "abc" if await store.get("me", id)] == ["b", "c"]


async def test_a_write_that_fails_takes_no_room() -> None:
    async with opened(max_bytes=2 * kept("a").size) as store:
        await store.put("me", kept("a"))
        with pytest.raises(sqlite3.IntegrityError):
            await store.put("me", kept("a"))
        await store.put("me", kept("b"))
        assert await store.get("me", "a")
        assert await store.get("me", "b")


async def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other.sqlite"
    text.write_text("no database " * 100)
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE mine (x)")
    database.commit()
    database.close()
    for path in (text, other, tmp_path / "nowhere" / "x", tmp_path):
        with pytest.raises(ConfigError, match="--responses-store"):
            ResponseStore.open(str(path), 2**20)


async def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with opened(path):
        with pytest.raises(ConfigError, match="locked"):
            ResponseStore.open(str(path), 2**20)
