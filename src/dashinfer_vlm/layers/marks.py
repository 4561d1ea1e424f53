"""Points in what a device does."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Mark(Protocol):
    def wait(self) -> None:
        """Until the device has come here."""
        ...

    def seconds_to(self, later: Any) -> float:
        """Between two marks of one device that it has passed."""
        ...


class HostMark:
    """Of a processor, which is here already."""

    def __init__(self) -> None:
        self.at_s = time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds_to(self, later: HostMark) -> float:
        return later.at_s - self.at_s


class CardMark:
    """Of the current stream of a card."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_to(self, later: CardMark) -> float:
        return float(self.event.elapsed_time(later.event)) / 1e3


def mark(device: torch.device) -> Mark:
    """Behind all that the device has been given so far."""
    return CardMark() if device.type == "cuda" else HostMark()
