"""How long slices of the encoder take, on a device that computes while it is asked to and on one that does not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CardClock", "HostClock", "SliceClock", "slice_clock"]

SLICE_RATE = 0.2
"""Weight of the latest slice in the estimate: a machine that slows down is noticed, one hiccup is forgotten soon."""


class SliceClock(Protocol):
    """Times one slice at a time."""

    @property
    def slice_s(self) -> float:
        """What a slice takes, the latest weighing most; 0 before the first."""
        ...

    def start(self) -> None: ...

    def stop(self) -> float:
        """Seconds of the slice since `start`, as far as they are known."""
        ...


class HostClock:
    """For work that is done when the call returns."""

    def __init__(self) -> None:
        self.slice_s = 0.0
        self._started_s = 0.0

    def start(self) -> None:
        self._started_s = time.perf_counter()

    def stop(self) -> float:
        seconds = time.perf_counter() - self._started_s
        self.slice_s = _estimate(self.slice_s, seconds)
        return seconds


class CardClock:
    """For work that a card does later: slices are timed by events on its stream, and nobody waits for them but for the
    first, of which nothing is known."""

    def __init__(self, make_event: Callable[..., Any] = torch.cuda.Event) -> None:
        self.slice_s = 0.0
        self._make_event = make_event
        self._slices: deque[tuple[Any, Any]] = deque()  # begin and end of those that may still be under way

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
            self.slice_s = _estimate(self.slice_s, begin.elapsed_time(end) / 1e3)
        return self.slice_s

    def _event(self) -> Any:
        event = self._make_event(enable_timing=True)
        event.record()
        return event


def slice_clock(device: torch.device) -> SliceClock:
    return CardClock() if device.type == "cuda" else HostClock()


def _estimate(before: float, seconds: float) -> float:
    return before + SLICE_RATE * (seconds - before) if before else seconds
