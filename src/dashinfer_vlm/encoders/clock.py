"""How long slices of the encoder take, on a device that computes while it is asked to and on one that does not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median_low
from typing import Any, Protocol

import torch

__all__ = ["CardClock", "HostClock", "SliceClock", "slice_clock"]

NUM_LATEST = 16
"""Slices that the estimate follows: a machine that slows down is noticed, and slices of a block differ."""
MAX_RATIO = 10.0
"""A slice counts as so many usual ones at the most: one for which a kernel was compiled or memory was allocated says
little about the next."""


class SliceClock(Protocol):
    """Times one slice at a time."""

    @property
    def slice_s(self) -> float:
        """What a slice takes, of the latest ones; 0 before the first."""
        ...

    def start(self) -> None: ...

    def stop(self) -> float:
        """Seconds of the slice since `start`, as far as they are known."""
        ...


class _Latest:
    """Seconds of the latest slices, and what they say of the next one."""

    def __init__(self) -> None:
        self.slice_s = 0.0
        self._seconds: deque[float] = deque(maxlen=NUM_LATEST)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        most = MAX_RATIO * median_low(self._seconds)
        self.slice_s = sum(min(slice_s, most) for slice_s in self._seconds) / len(self._seconds)


class HostClock:
    """For work that is done when the call returns."""

    def __init__(self) -> None:
        self._latest = _Latest()
        self._started_s = 0.0

    @property
    def slice_s(self) -> float:
        return self._latest.slice_s

    def start(self) -> None:
        self._started_s = time.perf_counter()

    def stop(self) -> float:
        seconds = time.perf_counter() - self._started_s
        self._latest.add(seconds)
        return seconds


class CardClock:
    """For work that a card does later: slices are timed by events on its stream, and nobody waits for them but for the
    first, of which nothing is known."""

    def __init__(self, make_event: Callable[..., Any] = torch.cuda.Event) -> None:
        self._latest = _Latest()
        self._make_event = make_event
        self._slices: deque[tuple[Any, Any]] = deque()  # begin and end of those that may still be under way

    @property
    def slice_s(self) -> float:
        return self._latest.slice_s

    def start(self) -> None:
        self._slices.append((self._event(), None))

    def stop(self) -> float:
        """The estimate, which follows the slices that have ended meanwhile."""
        begin, _ = self._slices.pop()
        self._slices.append((begin, self._event()))
        if not self.slice_s:
            self._slices[-1][1].synchronize()
        while self._slices and self._slices[0][1].query():
            begin, end = self._slices.popleft()
            self._latest.add(begin.elapsed_time(end) / 1e3)
        return self.slice_s

    def _event(self) -> Any:
        event = self._make_event(enable_timing=True)
        event.record()
        return event


def slice_clock(device: torch.device) -> SliceClock:
    return CardClock() if device.type == "cuda" else HostClock()
