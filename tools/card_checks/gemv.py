"""A candidate: one row times a weight of 16, 8 or 4 bits by plain sums, without products of tiles. `products` times it
beside what serves.

A weight is read once and nothing else counts, so that every thread reads 16 bytes at a time, and some of them before
the first is needed: the rounds are unrolled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import launch
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = ["CUTS", "row_times"]

CUTS = {16: (4, 1024), 8: (4, 2048), 4: (8, 2048)}
"""Rows of the weight that a program takes, and columns of a round."""


@triton.jit
def _row_times(
    x, w, scales, out, w_n, s_n, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROUNDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    n3 = n[:, None, None]
    each = tl.arange(0, BK // 128)
    c = tl.arange(0, 64 if BITS == 4 else 128)[None, None, :]
    acc = tl.zeros([BN, BK // 128], tl.float32)
    for i in tl.range(0, ROUNDS, loop_unroll_factor=4):
        group = i * (BK // 128) + each
        g = group[None, :, None]
        k = g * 128 + c
        there = (n3 < N) & (g * 128 < K)
        first = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if BITS == 4:
            pair = tl.load(w + n3 * w_n + g * 64 + c, mask=there, other=0).to(tl.int32)
            second = tl.load(x + k + 64, mask=k + 64 < K, other=0.0).to(tl.float32)
            found = ((pair & 15) - 8).to(tl.float32) * first + ((pair >> 4) - 8).to(tl.float32) * second
        else:
            there = (n3 < N) & (k < K) if BITS == 16 else there
            found = tl.load(w + n3 * w_n + k, mask=there, other=0).to(tl.float32) * first
        sums = tl.sum(found, 2)
        if BITS < 16:
            inside = (n < N)[:, None] & (group * 128 < K)[None, :]
            sums *= tl.load(scales + n[:, None] * s_n + group[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += sums
    tl.store(out + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=n < N)


def row_times(x: Tensor, weight: GroupedWeight) -> Tensor:
    """[1, N] of x's dtype: x [1, K] times the weight, transposed."""
    size, depth = len(weight.numbers), weight.depth
    rows, columns = CUTS[weight.bits]
    out = torch.empty(1, size, dtype=x.dtype, device=x.device)
    scales = out if weight.scales is None else weight.scales
    padded = depth if weight.bits == 16 else -(-depth // GROUP) * GROUP
    launch(
        _row_times, (-(-size // rows),), x, weight.numbers, scales, out, weight.numbers.stride(0), scales.stride(0),
        size, depth, rows, columns, -(-padded // columns), weight.bits, num_warps=4,
    )  # fmt: skip
    return out
