"""Products of few rows, which are bound by reading the weight: of 8 or 4 bits with a scale per 128 columns.

What comes after a product rides in it: SiLU times up and the residual. Where the weight has too few rows to keep a card
busy, several programs share its columns, and `_finish` adds up what they found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import Tile, check, compute_type, launch, power_of_two
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = ["MOST_ROWS", "expand", "num_splits", "product"]

MOST_ROWS = 128
"""Beyond them arithmetic counts, and a weight is better expanded once."""
WANTED_PROGRAMS = 400
"""About three for each multiprocessor of a large card."""
LEAST_GROUPS = 4
"""Of a split: adding it up costs as much as reading them."""


@triton.jit
def _columns(x_places, first, k, K, mine, C: tl.constexpr):
    """Columns `first + k` of the rows."""
    return tl.load(x_places + first + k[None, :], mask=mine[:, None] & (first + k < K)[None, :], other=0.0).to(C)


@triton.jit
def _add(acc, low, high, w_places, scales, group, wanted, BITS: tl.constexpr, C: tl.constexpr):
    """`acc` [BM, BN] and what a group of columns adds. `low` and `high` are its halves; of 8 bits, `low` is all."""
    if BITS == 8:
        k = tl.arange(0, 128)
        w = tl.load(w_places + group * 128 + k[:, None], mask=wanted & (k < 128)[:, None], other=0)
        part = tl.dot(low, w.to(C), input_precision="ieee")
    else:
        k = tl.arange(0, 64)
        w = tl.load(w_places + group * 64 + k[:, None], mask=wanted & (k < 64)[:, None], other=0).to(tl.int32)
        part = tl.dot(low, ((w & 15) - 8).to(C), input_precision="ieee")
        part = tl.dot(high, ((w >> 4) - 8).to(C), part, input_precision="ieee")
    return acc + part * tl.load(scales + group, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _surrounded(
    acc, up, bias, residual, m, n, inside, r_t, N: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What is done to finished sums [BM, BN]."""
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = acc / (1 + tl.exp(-acc)) * up
    if RESIDUAL:
        acc += tl.load(residual + m.to(tl.int64)[:, None] * r_t + n[None, :], mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["T"])
def _multiply(
    x_rows, w, scales, bias, residual, out, T, x_t, w_n, s_n, r_t, o_t, o_split, N: tl.constexpr, K: tl.constexpr,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    mine = m < T
    wanted = (n < N)[None, :]
    x_places = x_rows + m.to(tl.int64)[:, None] * x_t
    w_places = w + n.to(tl.int64)[None, :] * w_n
    scale_places = scales + n.to(tl.int64)[None, :] * s_n
    acc = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    groups: tl.constexpr = (K + 127) // 128
    each: tl.constexpr = (groups + SPLITS - 1) // SPLITS
    half = tl.arange(0, 64)
    for group in tl.range(split * each, tl.minimum(split * each + each, groups)):
        if BITS == 4:
            low = _columns(x_places, group * 128, half, K, mine, C)
            high = _columns(x_places, group * 128 + 64, half, K, mine, C)
        else:
            low = _columns(x_places, group * 128, tl.arange(0, 128), K, mine, C)
            high = low
        acc = _add(acc, low, high, w_places, scale_places, group, wanted, BITS, C)
        if GATED:
            up = _add(up, low, high, w_places + N * w_n, scale_places + N * s_n, group, wanted, BITS, C)
    inside = mine[:, None] & wanted
    place = out + split * o_split + m.to(tl.int64)[:, None] * o_t + n[None, :]
    if SPLITS == 1:
        acc = _surrounded(acc, up, bias, residual, m, n, inside, r_t, N, BIAS, GATED, RESIDUAL)
    elif GATED:
        tl.store(place + N, up, mask=inside)
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    parts, bias, residual, out, p_split, p_t, r_t, o_t, N: tl.constexpr, SPLITS: tl.constexpr, B: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * B + tl.arange(0, B)
    inside = (n < N)[None, :]
    acc = tl.zeros([1, B], tl.float32)
    up = tl.zeros([1, B], tl.float32)
    place = parts + m.to(tl.int64)[:, None] * p_t + n[None, :]
    for split in tl.static_range(SPLITS):
        acc += tl.load(place + split * p_split, mask=inside, other=0.0)
        if GATED:
            up += tl.load(place + split * p_split + N, mask=inside, other=0.0)
    acc = _surrounded(acc, up, bias, residual, m, n, inside, r_t, N, BIAS, GATED, RESIDUAL)
    tl.store(out + m.to(tl.int64)[:, None] * o_t + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _expand(w, scales, out, w_n, s_n, o_n, K, B: tl.constexpr, BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * B + tl.arange(0, B)
    group = k // 128
    if BITS == 8:
        number = tl.load(w + row * w_n + k, mask=k < K, other=0).to(tl.float32)
    else:
        pair = tl.load(w + row * w_n + group * 64 + k % 64, mask=k < K, other=0).to(tl.int32)
        number = (tl.where(k % 128 < 64, pair & 15, pair >> 4) - 8).to(tl.float32)
    number *= tl.load(scales + row * s_n + group, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row * o_n + k, number.to(out.dtype.element_ty), mask=k < K)


def expand(weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """`layers.grouped.expand`: [N, K] of `dtype` from 8 or 4 bits."""
    size, depth = len(weight.numbers), weight.depth
    out = torch.empty(size, depth, dtype=dtype, device=weight.numbers.device)
    launch(
        _expand, (size, -(-depth // 1024)), weight.numbers, weight.scales, out, weight.numbers.stride(0),
        weight.scales.stride(0), out.stride(0), depth, 1024, weight.bits, num_warps=4,
    )  # fmt: skip
    return out


def tile_for(num_rows: int, *, is_gated: bool) -> Tile:
    """Two tiles of a gated product at once fill the registers."""
    return Tile(16, 32, 4, 4) if num_rows <= 16 else Tile(64, 32 if is_gated else 64, 4, 4)


def num_splits(num_programs: int, num_groups: int) -> int:
    """A power of two, so that `num_programs` times it fill a card, and every split has some groups of columns."""
    wanted = min(WANTED_PROGRAMS // max(num_programs, 1), num_groups // LEAST_GROUPS, 16)
    return power_of_two(wanted + 1) // 2 if wanted > 1 else 1


def product(
    x: Tensor,
    weight: GroupedWeight,
    bias: Tensor | None = None,
    *,
    silu_mul: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """[T, N] of `dtype`, else of x's (N / 2 with `silu_mul`): x [T, K] times the weight, transposed, plus a bias [N];
    then SiLU of the first half times the second; then plus `residual`, whose memory `out` may be.

    `splits`, a power of two, is how many programs share the columns of a row of the weight; None chooses. Raises
    ValueError for shapes that do not fit.
    """
    num_rows, depth = x.shape
    rows_of_weight = len(weight.numbers)
    size = rows_of_weight // 2 if silu_mul else rows_of_weight
    check(depth == weight.depth, f"the weight has {weight.depth} columns", x)
    check(x.stride(1) == weight.numbers.stride(1) == 1, "rows must be dense", x, weight.numbers)
    check(residual is None or residual.shape == (num_rows, size), "the residual must fit the result", x, *(
        () if residual is None else (residual,)))  # fmt: skip
    tile = tile_for(num_rows, is_gated=silu_mul)
    grid = (-(-size // tile.columns), -(-num_rows // tile.rows))
    if splits is None:
        splits = num_splits(grid[0] * grid[1], -(-depth // GROUP))
    if out is None:
        out = torch.empty(num_rows, size, dtype=dtype or x.dtype, device=x.device)
    parts = out[None]
    if splits > 1:
        parts = torch.empty(splits, num_rows, rows_of_weight, dtype=torch.float32, device=x.device)
    absent = out  # in place of what is not there, and not looked at
    after = (absent if bias is None else bias, absent if residual is None else residual)
    r_t = 0 if residual is None else residual.stride(0)
    kinds = (bias is not None, silu_mul, residual is not None)
    launch(
        _multiply, (*grid, splits), x, weight.numbers, weight.scales, *after, parts, num_rows, x.stride(0),
        weight.numbers.stride(0), weight.scales.stride(0), r_t, parts.stride(1), parts.stride(0), size, depth, splits,
        tile.rows, tile.columns, weight.bits, *kinds, compute_type(x.dtype), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            _finish, (-(-size // 512), num_rows), parts, *after, out, parts.stride(0), parts.stride(1), r_t,
            out.stride(0), size, splits, 512, *kinds, num_warps=4,
        )  # fmt: skip
    return out
