"""The Walsh-Hadamard transform that keys of an int8 cache are stored after (see `layers.attention.write_kv`)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import compute_type, launch, power_of_two

__all__ = ["hadamard_blocks", "mixed_queries"]


@triton.jit(do_not_specialize=["num_rows"])
def _mix(q, mixer, out, num_rows, q_t, q_h, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
         BM: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    mine = row < num_rows * H
    q += (row // H).to(tl.int64)[:, None] * q_t + (row % H)[:, None] * q_h
    y = tl.zeros([BM, DP], tl.float32)
    for first in tl.static_range(0, DP, BK):
        k = first + tl.arange(0, BK)
        x = tl.load(q + k[None, :], mask=mine[:, None] & (k < D)[None, :], other=0.0).to(C)
        square = (k < D)[:, None] & (d < D)[None, :]
        matrix = tl.load(mixer + k[:, None] * D + d[None, :], mask=square, other=0.0).to(C)
        y = tl.dot(x, matrix, y, input_precision="ieee")
    inside = mine[:, None] & (d < D)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=inside)


@functools.cache
def hadamard_blocks(dim: int, device: torch.device) -> tuple[Tensor, int]:
    """float32 [dim, dim] with Sylvester's matrix of 1 and -1 along its diagonal, and the size of one: the largest power
    of two that divides `dim`, or 1 where that is below 8."""
    size = dim & -dim if dim % 8 == 0 else 1
    index = torch.arange(size)
    ones = (index[:, None] & index[None, :])[..., None] >> torch.arange(max(size.bit_length(), 1)) & 1
    matrix = 1.0 - 2.0 * (ones.sum(-1) % 2).float()
    return torch.kron(torch.eye(dim // size), matrix).to(device), size


@functools.cache
def _query_mixer(dim: int, device: torch.device) -> Tensor:
    blocks, size = hadamard_blocks(dim, device)
    return blocks / size


def mixed_queries(q: Tensor) -> Tensor:
    """Queries [T, H, D] as transformed keys want them, divided by the transform's size; a new contiguous tensor."""
    num_rows, num_heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    height, width = 32, power_of_two(dim, 16)
    launch(
        _mix, (-(-num_rows * num_heads // height),), q, _query_mixer(dim, q.device), out, num_rows, *q.stride()[:2],
        num_heads, dim, width, min(width, 64), height, compute_type(q.dtype), num_warps=4,
    )  # fmt: skip
    return out
