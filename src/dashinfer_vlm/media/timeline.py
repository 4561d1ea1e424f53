"""When the frames of a film are shown: by their own time stamps, not by what a header says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FASTEST, SLOWEST = 1000.0, 0.01
"""Believable frames per second; beyond, a header is wrong."""

_JITTER = 0.6
"""How far a frame of an even film may stand from its place, in frames: containers round, some of them coarsely."""
_LAST = 2.5
"""How long the last frame of an even film may stand, in frames."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """A film as a player shows it: `total` moments, of which there are `rate` in a second.

    In an even film a moment is a frame. In one of variable rate a moment shows the newest frame, so that a scene that
    stands for long is as long for whoever counts moments.
    """

    rate: float
    total: int
    even: bool
    times: NDArray[np.float64]
    """Seconds from the first frame to each, ascending."""

    @property
    def seconds(self) -> float:
        return self.total / self.rate

    def frame(self, moment: int) -> int:
        """Number of the frame that is shown then, in the order of showing."""
        if self.even:
            return moment
        return max(0, int(np.searchsorted(self.times, (moment + 1e-3) / self.rate, side="right")) - 1)


def timeline(times: NDArray[np.float64], last_s: float, header_rate: float) -> Timeline:
    """The timeline of at least one frame shown at `times` (ascending, from 0), of which the last stands for `last_s`.

    `header_rate` is what the container says, 0 when it says nothing. `last_s` 0 is unknown.
    """
    number = len(times)
    if number == 1:
        return Timeline(_believable(header_rate) or 1.0, 1, True, times)
    for rate in (_believable(header_rate), _believable((number - 1) / max(float(times[-1]), 1e-9))):
        if rate and _is_even(times, last_s, rate):
            return Timeline(rate, number, True, times)
    gaps = np.diff(times)
    usual = float(np.median(gaps[gaps > 0])) if np.any(gaps > 0) else 1.0
    rate = _believable(header_rate)
    if not rate or not 0.98 <= rate * usual <= 1.02:  # the header's is exact where it says the same
        rate = round(min(max(1 / usual, SLOWEST), FASTEST), 3)
    length = float(times[-1]) + (last_s or usual)
    return Timeline(rate, max(1, round(length * rate)), False, times)


def _believable(rate: float) -> float:
    return rate if SLOWEST <= rate <= FASTEST else 0.0


def _is_even(times: NDArray[np.float64], last_s: float, rate: float) -> bool:
    places = np.arange(len(times)) / rate
    return float(np.abs(times - places).max()) * rate <= _JITTER and last_s * rate <= _LAST
