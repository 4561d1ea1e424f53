"""Leases, single-flight and the byte budget, with values that are made on command."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.media.cache import ByteBudget, Lease, LeasedCache


class Maker:
    """Makes strings when told to, and remembers what was made and disposed of."""

    def __init__(self, budget: int) -> None:
        self.cache = LeasedCache[str](budget, size_of=len, dispose=lambda value: self.disposed.append(value))
        self.made: list[str] = []
        self.disposed: list[str] = []
        self.go = asyncio.Event()
        self.go.set()

    async def make(self, value: str) -> str:
        self.made.append(value)
        await self.go.wait()
        if value == "bad":
            raise ValueError(value)
        return value

    def lease(self, value: str) -> Coroutine[Any, Any, Lease[str]]:
        return self.cache.lease(value, lambda: self.make(value))


async def test_all_who_ask_at_once_share_one_making() -> None:
    maker = Maker(100)
    leases = await asyncio.gather(*(maker.lease("a") for _ in range(16)))
    assert maker.made == ["a"]
    assert {lease.value for lease in leases} == {"a"}
    assert (maker.cache.num_hits, maker.cache.num_misses) == (15, 1)


async def test_an_error_goes_to_all_who_wait_and_is_not_kept() -> None:
    maker = Maker(100)
    results = await asyncio.gather(*(maker.lease("bad") for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["bad"] * 3
    with pytest.raises(ValueError, match="bad"):
        await maker.lease("bad")
    assert maker.made == ["bad", "bad"]


async def test_one_who_leaves_does_not_end_the_making_and_the_last_one_does() -> None:
    maker = Maker(100)
    maker.go.clear()
    first, second, third = (asyncio.create_task(maker.lease("a")) for _ in range(3))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not second.done()
    second.cancel()
    third.cancel()
    await asyncio.gather(second, third, return_exceptions=True)
    maker.go.set()
    lease = await maker.lease("a")
    assert maker.made == ["a", "a"], "the first making was cancelled, so that a new one begins"
    assert maker.cache.num_bytes == 1
    lease.release()


async def test_a_leased_value_stays_beyond_the_budget() -> None:
    maker = Maker(2)
    leases = [await maker.lease(value) for value in ("aa", "bb", "cc")]
    assert maker.disposed == []
    assert maker.cache.num_bytes == 6
    leases[1].release()
    leases[1].release()
    assert maker.disposed == ["bb"]
    leases[0].release()
    leases[2].release()
    assert maker.disposed == ["bb", "aa"]
    assert maker.cache.num_bytes == 2


async def test_two_leases_of_a_value_are_two() -> None:
    maker = Maker(0)
    first, second = await maker.lease("a"), await maker.lease("a")
    first.release()
    assert maker.disposed == []
    second.release()
    assert maker.disposed == ["a"]


async def test_a_value_larger_than_the_budget_lives_as_long_as_its_lease() -> None:
    maker = Maker(3)
    (await maker.lease("a")).release()
    large = await maker.lease("large")
    assert maker.disposed == ["a"]
    large.release()
    assert maker.disposed == ["a", "large"]


async def test_close_disposes_of_everything_once() -> None:
    maker = Maker(100)
    lease = await maker.lease("a")
    maker.go.clear()
    waiting = asyncio.create_task(maker.lease("b"))
    await asyncio.sleep(0)
    await maker.cache.close()
    assert maker.disposed == ["a"]
    with pytest.raises(asyncio.CancelledError):
        await waiting
    lease.release()
    assert maker.disposed == ["a"]
    assert maker.cache.num_bytes == 0


STEPS = st.lists(st.tuples(st.sampled_from(["lease", "release", "cancel"]), st.integers(0, 4)), max_size=40)


@given(STEPS, st.integers(0, 6))
def test_any_course_of_events_keeps_the_books(steps: list[tuple[str, int]], budget: int) -> None:
    async def run() -> None:
        maker = Maker(budget)
        held: list[Lease[str]] = []
        for verb, n in steps:
            if verb == "lease":
                held.append(await maker.lease("x" * (n + 1)))
            elif verb == "cancel":
                task = asyncio.create_task(maker.lease("x" * (n + 1)))
                await asyncio.sleep(0)
                task.cancel()
                held += [r for r in await asyncio.gather(task, return_exceptions=True) if isinstance(r, Lease)]
            elif held:
                held.pop(n % len(held)).release()
            in_use = {lease.value for lease in held}
            assert maker.cache.num_bytes <= max(budget, sum(map(len, in_use)) + budget)
            for value in in_use:
                assert maker.made.count(value) > maker.disposed.count(value), "what is held is alive"
        for lease in held:
            lease.release()
        assert maker.cache.num_bytes <= budget
        await maker.cache.close()
        assert maker.cache.num_bytes == 0

    asyncio.run(run())


async def test_bytes_are_given_in_the_order_of_asking() -> None:
    budget = ByteBudget(10)
    first = budget.account()
    await first.grow(8)
    order: list[int] = []

    async def take(num_bytes: int) -> None:
        await budget.account().grow(num_bytes)
        order.append(num_bytes)

    large, small = asyncio.create_task(take(9)), asyncio.create_task(take(1))
    await asyncio.sleep(0)
    assert order == [], "the small one does not overtake"
    first.close()
    await asyncio.gather(large, small)
    assert order == [9, 1]
    assert budget.free_bytes == 0


async def test_one_who_leaves_the_line_makes_room_for_the_next() -> None:
    budget = ByteBudget(10)
    first = budget.account()
    await first.grow(8)
    large, small = asyncio.create_task(budget.account().grow(9)), asyncio.create_task(budget.account().grow(2))
    await asyncio.sleep(0)
    large.cancel()
    await small
    assert budget.free_bytes == 0
    first.close()
    first.close()
    assert budget.free_bytes == 8


async def test_bytes_given_to_one_who_just_left_come_back() -> None:
    budget = ByteBudget(10)
    first = budget.account()
    await first.grow(10)
    waiting = asyncio.create_task(budget.account().grow(4))
    await asyncio.sleep(0)
    first.close()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.free_bytes == 10


async def test_when_all_who_hold_bytes_want_more_the_last_one_gives_way() -> None:
    budget = ByteBudget(10)
    first, second = budget.account(), budget.account()
    await first.grow(5)
    await second.grow(5)
    waiting = asyncio.create_task(first.grow(2))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="busy with other media"):
        await second.grow(1)
    second.close()
    await waiting
    assert (first.num_bytes, budget.free_bytes) == (7, 3)


async def test_a_kept_value_keeps_nothing_of_who_had_it_made() -> None:
    """What runs for a request has all that is known of the request around it, its prompt for example."""
    current = ContextVar[object]("current")
    cache = LeasedCache[bytes](100, size_of=len, dispose=lambda _: None)

    class Known:
        pass

    async def made() -> bytes:
        return b"value"

    async def ask() -> weakref.ref[Known]:
        known = Known()
        current.set(known)
        (await cache.lease("a", made)).release()
        return weakref.ref(known)

    known = await asyncio.create_task(ask())
    for _ in range(3):  # the loop itself lets go of it a turn later
        await asyncio.sleep(0)
    assert cache.num_bytes == 5
    assert known() is None
