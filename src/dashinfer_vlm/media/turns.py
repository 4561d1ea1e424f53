"""Places that are taken in turns, so that whoever wants many does not make the others wait for all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class Turns:
    """`places` that parties share. A free place goes to the party that holds the fewest; among equals, to the one that
    has waited longest since its last turn. Belongs to one event loop."""

    def __init__(self, places: int, *, most_each: int | None = None) -> None:
        """`most_each` is what one party may hold at a time; None is all."""
        self.free = places
        self._most_each = most_each or places
        self._held: Counter[Hashable] = Counter()
        self._lines: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @asynccontextmanager
    async def place(self, party: Hashable) -> AsyncIterator[None]:
        """Wait for a place and hold it."""
        await self.take(party)
        try:
            yield
        finally:
            self.give_back(party)

    async def take(self, party: Hashable) -> None:
        """Wait for a place; whoever is cancelled while it waits holds none."""
        turn = asyncio.get_running_loop().create_future()
        self._lines.setdefault(party, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment
                self.give_back(party)
            else:
                self._leave(party, turn)
            raise

    def give_back(self, party: Hashable) -> None:
        self.free += 1
        self._held[party] -= 1
        if not self._held[party]:
            del self._held[party]
        if party in self._lines:
            self._lines.move_to_end(party)  # it has just had a turn
        self._hand_out()

    def _hand_out(self) -> None:
        while self.free and (waiting := [p for p in self._lines if self._held[p] < self._most_each]):
            party = min(waiting, key=lambda p: self._held[p])  # the first of equals
            turn = self._lines[party].popleft()
            self._lines.move_to_end(party)
            self._forget_empty(party)
            self.free -= 1
            self._held[party] += 1
            turn.set_result(None)

    def _leave(self, party: Hashable, turn: asyncio.Future[None]) -> None:
        self._lines[party].remove(turn)
        self._forget_empty(party)

    def _forget_empty(self, party: Hashable) -> None:
        if not self._lines[party]:
            del self._lines[party]
