"""Places that are taken in turns, so that whoever wants many does not make the others wait for all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeVar


class Party(NamedTuple):
    """For whom a place is taken: a request, and whose it is."""

    owner: Hashable = None
    request: Hashable = None


ANYBODY = Party()

_Line = deque[asyncio.Future[None]]


_T = TypeVar("_T")


def _give_one(held: Counter[_T], holder: _T) -> None:
    held[holder] -= 1
    if not held[holder]:
        del held[holder]


class Turns:
    """`places` that owners share, and their requests among themselves. A free place goes to the owner that holds the
    fewest, and of its requests to the one that does; among equals, to the one that has waited longest since its last
    turn. Belongs to one event loop."""

    def __init__(self, places: int, *, most_each: int | None = None) -> None:
        """`most_each` is what one request may hold at a time; None is all."""
        self.free = places
        self._most_each = most_each or places
        self._held: Counter[Party] = Counter()
        self._held_by_owner: Counter[Hashable] = Counter()
        self._lines: OrderedDict[Hashable, OrderedDict[Party, _Line]] = OrderedDict()
        """Who waits, by owner."""

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for lines in self._lines.values() for line in lines.values())

    @asynccontextmanager
    async def place(self, party: Party) -> AsyncIterator[None]:
        """Wait for a place and hold it."""
        await self.take(party)
        try:
            yield
        finally:
            self.give_back(party)

    async def take(self, party: Party) -> None:
        """Wait for a place; whoever is cancelled while it waits holds none."""
        turn = asyncio.get_running_loop().create_future()
        self._lines.setdefault(party.owner, OrderedDict()).setdefault(party, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment
                self.give_back(party)
            else:
                self._lines[party.owner][party].remove(turn)
                self._forget_empty(party)
            raise

    def give_back(self, party: Party) -> None:
        self.free += 1
        _give_one(self._held, party)
        _give_one(self._held_by_owner, party.owner)
        self._go_behind(party)
        self._hand_out()

    def _hand_out(self) -> None:
        while self.free and (party := self._next()) is not None:
            turn = self._lines[party.owner][party].popleft()
            self._go_behind(party)
            self._forget_empty(party)
            self.free -= 1
            self._held[party] += 1
            self._held_by_owner[party.owner] += 1
            turn.set_result(None)

    def _next(self) -> Party | None:
        """The party whose turn it is; None when nobody waits that may have a place."""
        owners = [owner for owner in self._lines if self._allowed(owner)]
        if not owners:
            return None
        owner = min(owners, key=lambda each: self._held_by_owner[each])  # the first of equals
        return min(self._allowed(owner), key=lambda each: self._held[each])

    def _allowed(self, owner: Hashable) -> list[Party]:
        return [party for party in self._lines[owner] if self._held[party] < self._most_each]

    def _go_behind(self, party: Party) -> None:
        """It and its owner have just had a turn."""
        if lines := self._lines.get(party.owner):
            self._lines.move_to_end(party.owner)
            if party in lines:
                lines.move_to_end(party)

    def _forget_empty(self, party: Party) -> None:
        lines = self._lines[party.owner]
        if not lines[party]:
            del lines[party]
        if not lines:
            del self._lines[party.owner]
