"""The way of weights to a card: from the mapped file through two pinned buffers, one of which is filled while the other
travels. The CPU holds no copy of a model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from dashinfer_vlm.layers.marks import mark

__all__ = ["Upload", "upload_to"]

BUFFER_BYTES = 32 << 20
"""Travels in a millisecond or less, which is long beside what starting a copy costs."""


class Upload:
    """Copies to one device, whose two buffers stay for the next one. Not for two threads at once."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        is_card = device.type == "cuda"
        self.device = device
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_card) for _ in range(2)]
        self._sent = [mark(device) for _ in self._buffers]
        self._turn = 0

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Own copy of a CPU tensor of any strides as `dtype`, there in time for what follows on the same stream. When
        this returns, nobody reads `tensor` any more."""
        there = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        rows, target = tensor.reshape(len(tensor), -1), there.view(len(tensor), -1)
        for part in self._pieces(len(tensor), target.shape[1] * dtype.itemsize):
            self._sent[self._turn].wait()
            size = target[part].numel() * dtype.itemsize
            pinned = self._buffers[self._turn][:size].view(dtype).view(target[part].shape)
            pinned.copy_(rows[part])  # converts, reads the file, and does both in torch's threads
            target[part].copy_(pinned, non_blocking=True)
            self._sent[self._turn] = mark(self.device)
            self._turn ^= 1
        return there

    def _pieces(self, num_rows: int, row_bytes: int) -> Iterator[slice]:
        count = len(self._buffers[0]) // max(row_bytes, 1)
        assert count, f"a row of {row_bytes} bytes does not fit a buffer"
        return (slice(start, start + count) for start in range(0, num_rows, count))


@functools.cache
def upload_to(device: torch.device) -> Upload:
    """The one of this process for `device`."""
    return Upload(device)
