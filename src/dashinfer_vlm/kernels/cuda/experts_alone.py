"""Experts of one row or two by themselves: pair by pair, by plain sums, in two launches.

A pair is a row and an expert that was chosen for it. Weights are of the rows' type, or 8-bit floats with scales; rows
stay as they are, since nothing counts here but reading the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda import gemv
from dashinfer_vlm.kernels.cuda.gemv import columns_of, row_of
from dashinfer_vlm.kernels.cuda.launch import INTERPRETED, launch, power_of_two, starts_early, wait_for_last

__all__ = ["MOST_ALONE", "add_alone", "silu"]

MOST_ALONE = 2
"""Rows that are multiplied pair by pair: hardly two of them share an expert."""
_WHOLE, _BY_ROWS, _BY_BLOCKS = 0, 1, 2
"""Weights without scales, with one per row, and with one per block of 128 x 128."""


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _gate_up_of_pair(
    h, x, w, scales, chosen, x_t, w_e, w_n, s_e, s_n, N: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ROUNDS: tl.constexpr, SCALES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """SiLU of gates times ups of one pair. With blocks all rows of a program lie in one."""
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    pair = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    wait_for_last(EARLY)
    expert = tl.load(chosen + pair).to(tl.int64)
    w += expert * w_e
    scales += expert * s_e
    x += pair // COUNT * x_t
    row_of_w = tl.minimum(n, N - 1)
    gates = w + row_of_w.to(tl.int64)[:, None] * w_n + k[None, :]
    ups = gates + N * w_n
    width: tl.constexpr = BK // 128 if SCALES == 2 else BK
    gate = tl.zeros([BN, width], tl.float32)
    up = tl.zeros([BN, width], tl.float32)
    for i in tl.static_range(ROUNDS):
        row = row_of(x, k, i * BK, K, BK)
        more = columns_of(gates, k, i * BK, K, BK).to(tl.float32) * row[None, :]
        more_up = columns_of(ups, k, i * BK, K, BK).to(tl.float32) * row[None, :]
        if SCALES == 2:
            block = i * width + tl.arange(0, width)
            of_gates = tl.load(scales + first // 128 * s_n + block, mask=block * 128 < K, other=0.0)
            of_ups = tl.load(scales + (N + first) // 128 * s_n + block, mask=block * 128 < K, other=0.0)
            more = tl.sum(tl.reshape(more, [BN, width, 128]), 2) * of_gates[None, :]
            more_up = tl.sum(tl.reshape(more_up, [BN, width, 128]), 2) * of_ups[None, :]
        gate += more
        up += more_up
    y, y_up = tl.sum(gate, 1), tl.sum(up, 1)
    if SCALES == 1:
        y *= tl.load(scales + row_of_w * s_n)
        y_up *= tl.load(scales + (N + row_of_w) * s_n)
    tl.store(h + pair * N + n, (silu(y) * y_up).to(h.dtype.element_ty), mask=n < N)


@triton.jit
def _down_of_row(
    out, h, w, scales, chosen, shares, residual, w_e, w_n, s_e, s_n, r_t, o_t, N: tl.constexpr, K: tl.constexpr,
    COUNT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, COUNTS: tl.constexpr, ROUNDS: tl.constexpr,
    SCALES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What all experts of a row make of it; a warp reads the columns of one expert."""
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    row = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, COUNTS)
    k = tl.arange(0, BK)
    pair = row * COUNT + j
    wait_for_last(EARLY)
    expert = tl.load(chosen + pair, mask=j < COUNT, other=0).to(tl.int64)
    share = tl.load(shares + pair, mask=j < COUNT, other=0.0).to(tl.float32)
    y = tl.load(residual + row * r_t + n, mask=n < N, other=0.0).to(tl.float32)
    x = h + pair[:, None] * K + k[None, :]
    row_of_w = tl.minimum(n, N - 1).to(tl.int64)
    places = w + row_of_w[:, None, None] * w_n + (expert[:, None] * w_e + k[None, :])[None, :, :]
    width: tl.constexpr = BK // 128 if SCALES == 2 else BK
    acc = tl.zeros([BN, COUNTS, width], tl.float32)
    for i in tl.static_range(ROUNDS):
        inside = (j < COUNT)[:, None] & (i * BK + k < K)[None, :]
        factor = tl.load(x + i * BK, mask=inside, other=0.0).to(tl.float32)
        columns = tl.load(places + i * BK, mask=inside[None, :, :], other=0.0, eviction_policy="evict_first")
        more = columns.to(tl.float32) * factor[None, :, :]
        if SCALES == 2:
            block = i * width + tl.arange(0, width)
            of_blocks = scales + expert[:, None] * s_e + first // 128 * s_n + block[None, :]
            of_blocks = tl.load(of_blocks, mask=(block * 128 < K)[None, :], other=0.0)
            more = tl.sum(tl.reshape(more, [BN, COUNTS, width, 128]), 3) * of_blocks[None, :, :]
        acc += more
    sums = tl.sum(acc, 2)
    if SCALES == 1:
        sums *= tl.load(scales + expert[None, :] * s_e + row_of_w[:, None] * s_n)
    y += tl.sum(sums * share[None, :], 1)
    tl.store(out + row * o_t + n, y.to(out.dtype.element_ty), mask=n < N)


def add_alone(
    out: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """See `experts.multiply`, or `experts_floats.multiply` where there are scales, of gates and ups, and of `down`."""
    (num_rows, size), count, inner = x.shape, chosen.shape[1], down.shape[2]
    h = torch.empty(chosen.numel(), inner, dtype=x.dtype, device=x.device)
    of_gate_up, of_down = (gate_up, down) if scales is None else scales
    kind = _WHOLE if scales is None else _BY_ROWS if of_down.shape[1:] == (size, 1) else _BY_BLOCKS
    tile, early = gemv.tile_for(inner, size), starts_early(x)
    launch(
        _gate_up_of_pair, (-(-inner // tile.rows), len(h)), h, x, gate_up, of_gate_up, chosen, x.stride(0),
        *gate_up.stride()[:2], *of_gate_up.stride()[:2], inner, size, count, tile.rows, tile.columns,
        -(-size // tile.columns), kind, early, num_warps=tile.warps, early=early,
    )  # fmt: skip
    rows, columns, counts = 64 if INTERPRETED else 2, 512 // down.itemsize, power_of_two(count)
    launch(
        _down_of_row, (-(-size // rows), num_rows), out, h, down, of_down, chosen, shares, residual,
        *down.stride()[:2], *of_down.stride()[:2], residual.stride(0), out.stride(0), size, inner, count, rows, columns,
        counts, -(-inner // columns), kind, early, num_warps=min(counts, 8), early=early,
    )  # fmt: skip
