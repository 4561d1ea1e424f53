"""Whose turn it is among sequences that wait: tenants share the engine by their weights, each has a line of its own.

Every tenant has a meter of what it has used, divided by its weight; the next sequence is of the one whose meter is
lowest (Sheng et al. 2024, "Fairness in Serving Large Language Models"). Whoever comes anew starts where the others are:
time in which nothing was asked is not saved up. What is used while nobody has to wait is not counted. Within a line,
lower `priority` goes first, then whoever came first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from dashinfer_vlm.engine.sequence import Sequence


class WaitingLine:
    """Sequences that have no place yet, in the order in which they are to get one."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Sequence]] = {}
        """Tenants of whom something waits, and what."""
        self._meters: dict[str, float] = {}
        """Tokens per weight that a tenant has used, of those that are ahead of the lowest ones."""
        self._lowest = 0.0
        """What the meter of the tenant showed whose turn it was last; nobody's shows less."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    def add(self, sequence: Sequence) -> None:
        """Behind those of its tenant and priority."""
        line = self._line(sequence)
        line.insert(bisect_right(line, sequence.priority, key=_priority), sequence)

    def put_back(self, sequence: Sequence) -> None:
        """In front of those of its tenant and priority: it has been running."""
        line = self._line(sequence)
        line.insert(bisect_left(line, sequence.priority, key=_priority), sequence)

    def first(self) -> Sequence:
        """Whose turn it is; there must be somebody. Of equal tenants, the one that has waited longest."""
        tenant = min(self._lines, key=self._meter)
        self._lowest = self._meter(tenant)
        return self._lines[tenant][0]

    def remove(self, sequence: Sequence) -> None:
        line = self._lines[sequence.request.tenant]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.request.tenant]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """The tenant has used so much."""
        request = sequence.request
        self._meters[request.tenant] = self._meter(request.tenant) + num_tokens / request.weight

    def _line(self, sequence: Sequence) -> list[Sequence]:
        tenant = sequence.request.tenant
        if not self._lines:
            self._meters, self._lowest = {}, 0.0
        if tenant not in self._lines:
            self._lines[tenant] = []
            self._meters = {name: used for name, used in self._meters.items() if used > self._lowest}
        return self._lines[tenant]

    def _meter(self, tenant: str) -> float:
        return max(self._meters.get(tenant, 0.0), self._lowest)


def _priority(sequence: Sequence) -> int:
    return sequence.priority
