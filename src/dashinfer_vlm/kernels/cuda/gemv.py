"""A row times a weight, by plain sums: with one row nothing counts but reading the weight, once and without a pause.

What surrounds a product in a layer rides in it: the norm before, bias, SiLU times up and the residual behind. Where a
card can start a kernel before the last one has ended, the first columns of the weight are on their way by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import (
    INTERPRETED,
    Tile,
    check,
    launch,
    power_of_two,
    starts_early,
    wait_for_last,
)
from dashinfer_vlm.kernels.cuda.rows import norm_times, silu_times

__all__ = ["MOST_NORMED", "columns_of", "product", "result_row", "row_of", "tile_for"]

MOST_NORMED = 8192
"""Columns of a row that a program holds as a whole, and whose norm it can take."""


@triton.jit
def columns_of(places, k, first: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Columns `first + k` of some rows; nothing is masked that need not be."""
    if first + BK <= K:
        return tl.load(places + first, eviction_policy="evict_first")
    return tl.load(places + first, mask=(first + k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def row_of(x, k, first: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Columns `first + k` of one row, as float32."""
    if first + BK <= K:
        return tl.load(x + first + k).to(tl.float32)
    return tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)


@triton.jit
def _row_times(
    x, gains, w, bias, residual, out, eps, w_n, N, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, ROUNDS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    places = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_n + k[None, :]
    ups = places + N.to(tl.int64) * w_n
    inside = n < N
    kind = out.dtype.element_ty
    first = columns_of(places, k, 0, K, BK)
    if GATED:
        first_up = columns_of(ups, k, 0, K, BK)
    if NORM:
        gain = row_of(gains, k, 0, K, BK)
    y = tl.zeros([BN], tl.float32)
    up = tl.zeros([BN], tl.float32)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    row = row_of(x, k, 0, K, BK)
    if RESIDUAL:
        more = tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        row = norm_times(row, gain, eps, kind, K)
    acc = first.to(tl.float32) * row[None, :]
    if GATED:
        acc_up = first_up.to(tl.float32) * row[None, :]
    for i in tl.static_range(1, ROUNDS):
        row = row_of(x, k, i * BK, K, BK)
        acc += columns_of(places, k, i * BK, K, BK).to(tl.float32) * row[None, :]
        if GATED:
            acc_up += columns_of(ups, k, i * BK, K, BK).to(tl.float32) * row[None, :]
    y += tl.sum(acc, 1)
    if GATED:
        y = silu_times(y.to(kind).to(tl.float32), (up + tl.sum(acc_up, 1)).to(kind).to(tl.float32), kind)
    if RESIDUAL:
        y += more
    tl.store(out + n, y.to(kind), mask=inside)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gains: Tensor | None = None,
    eps: float = 0.0,
    silu_mul: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[1, N] of x's dtype: x [1, K] times `weight` [N, K], transposed, plus `bias` [N].

    With `gains` [K], of which there are `MOST_NORMED` at most, x is first normed as by `rows.rms_norm`. `silu_mul`
    takes the weight's rows for gates, then ups, and gives [1, N / 2]. `residual`, of the result's shape, is added;
    `out` may be its memory. Raises ValueError for shapes that do not fit."""
    check(x.ndim == 2 and len(x) == 1 and x.stride(1) == weight.stride(1) == 1, "one dense row", x, weight)
    check(x.shape[1] == weight.shape[1] and x.dtype == weight.dtype, "row and weight must agree", x, weight)
    size, depth = weight.shape
    size = size // 2 if silu_mul else size
    check(gains is None or (depth <= MOST_NORMED and gains.shape == (depth,)), "too long for a norm", x)
    check(bias is None or bias.shape == weight.shape[:1], "a bias must be as long as the weight has rows", weight)
    out = result_row(out, residual, size, x.dtype, x.device)
    tile, early = tile_for(size, depth), starts_early(x)
    launch(
        _row_times, (-(-size // tile.rows),), x, x if gains is None else gains, weight, x if bias is None else bias,
        x if residual is None else residual, out, eps, weight.stride(0), size, depth, tile.rows, tile.columns,
        -(-depth // tile.columns), gains is not None, silu_mul, bias is not None, residual is not None, early,
        num_warps=tile.warps, early=early,
    )  # fmt: skip
    return out


def result_row(
    out: Tensor | None, residual: Tensor | None, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`out` or new memory [1, size]. Raises ValueError unless it and `residual` are one dense row of that size."""
    out = torch.empty(1, size, dtype=dtype, device=device) if out is None else out
    for y in (out,) if residual is None else (out, residual):
        check(y.shape == (1, size) and y.stride(1) == 1, f"residual and result must be one dense row of {size}", y)
    return out


def tile_for(size: int, depth: int) -> Tile:
    """The fastest on an H200 (docs/log.md): rows of the weight as a whole where a program can hold them, else four at a
    time, by so many warps that all of them keep a large card busy."""
    whole = power_of_two(depth, 128)
    if INTERPRETED:  # where a program costs more than what it does
        return Tile(64, min(whole, MOST_NORMED), 1, 1)
    if whole <= MOST_NORMED:
        return Tile(2, whole, max(1, whole // 1024), 1)
    warps = 4 if size <= 2048 else 2
    return Tile(4, 256 * warps, warps, 1)
