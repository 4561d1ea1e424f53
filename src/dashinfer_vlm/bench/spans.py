"""Who spends the time: nested spans on one thread, each with its own time, without that of the spans within it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

__all__ = ["Part", "Spans", "replaced"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Part:
    """What was spent under one name."""

    seconds: float = 0.0
    num_bytes: float = 0.0
    """Read from memory, at the least."""
    num_flops: float = 0.0
    num_calls: float = 0

    def __truediv__(self, count: int) -> Part:
        """The mean of `count` repetitions."""
        return Part(self.seconds / count, self.num_bytes / count, self.num_flops / count, self.num_calls / count)


class Spans:
    """Collects parts by phase and name. A span inside another one counts for itself only, in the phase that is set.

    `sync` is called at both ends of a span: on a card it waits for what was launched.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, sync: Callable[[], None] = lambda: None
    ) -> None:
        self.parts: dict[tuple[str, str], Part] = {}
        self._phase = "other"
        self._clock = clock
        self._sync = sync
        self._within: list[float] = [0.0]  # seconds that spans inside the open ones took; the first is of nobody

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what ends within the block under `name`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def span(self, name: str, num_bytes: float = 0.0, num_flops: float = 0.0) -> Iterator[None]:
        self._sync()
        self._within.append(0.0)
        start = self._clock()
        try:
            yield
        finally:
            self._sync()
            seconds = self._clock() - start
            part = self.parts.setdefault((self._phase, name), Part())
            part.seconds += seconds - self._within.pop()
            part.num_bytes += num_bytes
            part.num_flops += num_flops
            part.num_calls += 1
            self._within[-1] += seconds

    def timed(self, name: str, call: Callable[P, R]) -> Callable[P, R]:
        """`call` as a span."""

        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.span(name):
                return call(*args, **kwargs)

        return wrapper

    def take(self, phase: str) -> dict[str, Part]:
        """The parts of `phase`, largest first; they are forgotten here."""
        found = {name: part for (of, name), part in self.parts.items() if of == phase}
        self.parts = {key: part for key, part in self.parts.items() if key[0] != phase}
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` within the block; it must exist."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
