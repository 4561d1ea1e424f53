"""An encoder elsewhere that does as it is told."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from dashinfer_vlm.request import Item

TIMEOUT_S = 10.0


class Told:
    """An encoder whose starts and batches end as the lists say; what is not told goes well."""

    def __init__(self, starts: Sequence[Exception] = (), batches: Sequence[Exception] = ()) -> None:
        self.starts, self.batches = list(starts), list(batches)
        self.num_started = self.num_stopped = 0
        self.may_start = threading.Event()
        self.may_start.set()
        self.may_encode = threading.Event()
        self.may_encode.set()
        self.encoding = threading.Event()
        self.alive = False

    def start(self) -> None:
        self.may_start.wait(TIMEOUT_S)
        if self.starts:
            raise self.starts.pop(0)
        self.num_started += 1
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def encode(self, items: Sequence[Item]) -> list[torch.Tensor]:
        self.encoding.set()
        self.may_encode.wait(TIMEOUT_S)
        if self.batches:
            raise self.batches.pop(0)
        return [torch.zeros(item.num_tokens, 4) for item in items]

    def interrupt(self) -> None:
        self.may_start.set()
        self.may_encode.set()

    def stop(self) -> None:
        self.num_stopped += 1
        self.alive = False


def item(number: int) -> Item:
    patches = torch.zeros(4, 2, dtype=torch.uint8)
    return Item(kind="image", start=0, num_tokens=1, content_hash=bytes([number]) * 32, grid=(1, 2, 2), patches=patches)
