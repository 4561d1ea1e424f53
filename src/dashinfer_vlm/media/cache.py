"""Values that are made once and shared by all who want them at the same time, and kept while there is room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from dashinfer_vlm.errors import OverloadedError

BUSY = "the server is busy with other media; try again later"

V = TypeVar("V")


class Lease(Generic[V]):
    """A value that stays until `release`, which may be called again without effect."""

    __slots__ = ("_give_back", "value")

    def __init__(self, value: V, give_back: Callable[[], None]) -> None:
        self.value = value
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


@dataclass(slots=True, eq=False)
class _Entry(Generic[V]):
    making: asyncio.Task[V] | None
    """None once the value is there: a task keeps all that is known around whoever it was begun for."""
    made: tuple[V, int] | None = None
    """The value and its bytes."""
    leases: int = 0


class LeasedCache(Generic[V]):
    """Least recently used values go first; a value that is leased or in the making is never removed.

    `budget_bytes` 0 keeps nothing beyond its last lease. The budget counts leased values too, so what is in use may
    exceed it. Belongs to one event loop: leases are taken and released on its thread.
    """

    def __init__(self, budget_bytes: int, *, size_of: Callable[[V], int], dispose: Callable[[V], None]) -> None:
        self._budget = budget_bytes
        self._size_of = size_of
        self._dispose = dispose
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        """Leases of a value that was there or in the making."""
        self.num_misses = 0

    async def lease(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, V]]) -> Lease[V]:
        """The value of `key`, made by `make` unless it is there or somebody is making it.

        All who wait get the value, or the error of `make`, which is not kept. `make` runs in a task of its own: a
        caller that is cancelled does not end it for the others; when the last one leaves, it is cancelled.
        """
        entry = self._entries.get(key)
        if entry is None:
            self.num_misses += 1
            task = asyncio.create_task(make())
            entry = self._entries[key] = _Entry(task)
            task.add_done_callback(partial(self._made, key, entry))
        else:
            self.num_hits += 1
            self._entries.move_to_end(key)
        entry.leases += 1
        try:
            value = await _value_of(entry)
        except BaseException:
            self._give_back(key, entry)
            raise
        return Lease(value, partial(self._give_back, key, entry))

    def drop_unused(self) -> int:
        """Remove every value that nobody leases; how many there were."""
        unused = self._unused()
        for key, entry in unused:
            self._remove(key, entry)
        return len(unused)

    async def close(self) -> None:
        """Cancel what is in the making and dispose of everything, leased or not."""
        entries = list(self._entries.items())
        making = [entry.making for _, entry in entries if entry.making is not None]
        for key, entry in entries:
            self._remove(key, entry)
        await asyncio.gather(*making, return_exceptions=True)

    def _made(self, key: Hashable, entry: _Entry[V], task: asyncio.Task[V]) -> None:
        """Runs before those who wait, so that the value cannot be evicted before they hold it."""
        if task.cancelled() or task.exception() is not None:
            self._remove(key, entry)
        elif self._entries.get(key) is not entry:  # everybody left while its last line ran
            self._dispose(task.result())
        else:
            value = task.result()
            entry.making, entry.made = None, (value, self._size_of(value))
            self.num_bytes += entry.made[1]
            self._evict()

    def _give_back(self, key: Hashable, entry: _Entry[V]) -> None:
        entry.leases -= 1
        if entry.leases == 0 and entry.making is not None and not entry.making.done():
            self._remove(key, entry)
        self._evict()

    def _evict(self) -> None:
        if self.num_bytes <= self._budget:
            return  # as after nearly every lease: there may be thousands to look through
        for key, entry in self._unused():
            if self.num_bytes <= self._budget:
                return
            self._remove(key, entry)

    def _unused(self) -> list[tuple[Hashable, _Entry[V]]]:
        """What is there and nobody leases, the least recently used first."""
        return [(key, entry) for key, entry in self._entries.items() if entry.leases == 0 and entry.made is not None]

    def _remove(self, key: Hashable, entry: _Entry[V]) -> None:
        if self._entries.get(key) is not entry:
            return
        del self._entries[key]
        if entry.making is not None:
            entry.making.cancel()
        if entry.made is not None:
            value, num_bytes = entry.made
            self.num_bytes -= num_bytes
            self._dispose(value)


async def _value_of(entry: _Entry[V]) -> V:
    if entry.made is not None:
        return entry.made[0]
    assert entry.making is not None, entry
    return await asyncio.shield(entry.making)


class ByteBudget:
    """Bytes that may be held at once, taken as they arrive; who finds no room waits in line. Belongs to one event
    loop."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.free_bytes = total_bytes
        self._line: deque[tuple[int, asyncio.Future[None], Account]] = deque()

    def account(self) -> Account:
        """For one owner, who closes it."""
        return Account(self)

    async def take(self, num_bytes: int, account: Account) -> None:
        """See `Account.grow`."""
        if not self._line and num_bytes <= self.free_bytes:
            self.free_bytes -= num_bytes
            return
        self._check_that_somebody_can_finish(account)
        place = asyncio.get_running_loop().create_future()
        entry = num_bytes, place, account
        self._line.append(entry)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # its turn came in the same moment
                self.give_back(num_bytes)
            else:
                self._line.remove(entry)
                self._admit()
            raise

    def give_back(self, num_bytes: int) -> None:
        self.free_bytes += num_bytes
        self._admit()

    def _check_that_somebody_can_finish(self, account: Account) -> None:
        """If all bytes were held by those who wait for more, nobody would ever give any back."""
        waiting = {account, *(other for _, _, other in self._line)}
        if self.free_bytes + sum(other.num_bytes for other in waiting) >= self.total_bytes:
            raise OverloadedError(BUSY, reason="media_wait")

    def _admit(self) -> None:
        while self._line and self._line[0][0] <= self.free_bytes:
            num_bytes, place, _ = self._line.popleft()
            self.free_bytes -= num_bytes
            place.set_result(None)


class Account:
    """What one owner holds of a budget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    async def grow(self, num_bytes: int) -> None:
        """Take `num_bytes` more, first come, first served.

        Raises OverloadedError when everybody who holds bytes waits for more: the one who comes last gives way.
        """
        assert self.num_bytes + num_bytes <= self._budget.total_bytes, (self.num_bytes, num_bytes)
        await self._budget.take(num_bytes, self)
        self.num_bytes += num_bytes

    def close(self) -> None:
        """Give everything back; may be called again."""
        num_bytes, self.num_bytes = self.num_bytes, 0
        self._budget.give_back(num_bytes)
