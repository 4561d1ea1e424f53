"""The Walsh-Hadamard transform that keys of an int8 cache are stored after (see `layers.attention.write_kv`)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["hadamard_blocks"]


@functools.cache
def hadamard_blocks(dim: int, device: torch.device) -> tuple[Tensor, int]:
    """float32 [dim, dim] with Sylvester's matrix of 1 and -1 along its diagonal, and the size of one: the largest power
    of two that divides `dim`, or 1 where that is below 8."""
    size = dim & -dim if dim % 8 == 0 else 1
    index = torch.arange(size)
    ones = (index[:, None] & index[None, :])[..., None] >> torch.arange(max(size.bit_length(), 1)) & 1
    matrix = 1.0 - 2.0 * (ones.sum(-1) % 2).float()
    return torch.kron(torch.eye(dim // size), matrix).to(device), size
