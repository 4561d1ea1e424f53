"""Counters by which the last of the programs that share a piece of work is told."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["arrived_of"]

_ARRIVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def arrived_of(owner: Tensor, size: int) -> Tensor:
    """int32 [size], kept as long as `owner`: zero before and after every launch, of which no two may be under way at a
    time. An owner has one size. Graphs hold its address: it is first asked for before one is captured."""
    if owner not in _ARRIVED:
        assert owner.device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "first used in a graph"
        _ARRIVED[owner] = torch.zeros(size, dtype=torch.int32, device=owner.device)
    found: Tensor = _ARRIVED[owner]
    return found
