"""Mixtures of experts: who is chosen for each row, and the sum of what they make of it.

A pair is a row and an expert that was chosen for it. One or two rows by themselves are multiplied pair by pair
(`experts_alone.py`). Of more rows pairs are sorted by their experts into tiles first, so that rows of one expert
are multiplied together and its weight is read once; as in `skinny.py` the weight's rows are the tall side of a tile.
How many launches and programs there are follows from shapes alone, and nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashinfer_vlm.kernels.cuda.experts_alone import MOST_ALONE, add_alone, silu
from dashinfer_vlm.kernels.cuda.launch import (
    Tile,
    check,
    compute_type,
    has_tiles,
    is_roomy,
    launch,
    power_of_two,
    starts_early,
    wait_for_last,
)
from dashinfer_vlm.kernels.cuda.rows import magnitudes
from dashinfer_vlm.kernels.cuda.skinny import can_multiply, tile_of

__all__ = ["add_shares", "choose", "multiply", "rows_for", "sort_pairs"]


@triton.jit
def _choose_experts(
    logits, experts, shares, l_t, E: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr, COUNTS: tl.constexpr,
    NORMALISE: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    j = tl.arange(0, COUNTS)
    wait_for_last(EARLY)
    x = tl.load(logits + row * l_t + i, mask=i < E, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    # probabilities as whole numbers, above the places from the last one on: no two are equal, and NaN is an expert, too
    order = (magnitudes(x / tl.sum(x, 0)).to(tl.int64) << 32) | (B - 1 - i)
    order = tl.where(i < E, order, -1)
    expert = tl.zeros([COUNTS], tl.int32)
    share = tl.zeros([COUNTS], tl.float32)
    for found in tl.static_range(COUNT):
        largest = tl.max(order, 0)
        order = tl.where(order == largest, -1, order)
        expert = tl.where(j == found, B - 1 - largest.to(tl.int32), expert)
        share = tl.where(j == found, (largest >> 32).to(tl.int32).to(tl.float32, bitcast=True), share)
    if NORMALISE:
        share /= tl.sum(share, 0)
    if SHARED:
        expert = tl.where(j == COUNT, E, expert)
        share = tl.where(j == COUNT, 1 / (1 + tl.exp(-tl.load(logits + row * l_t + E).to(tl.float32))), share)
    width: tl.constexpr = COUNT + SHARED
    tl.store(experts + row * width + j, expert, mask=j < width)
    tl.store(shares + row * width + j, share.to(shares.dtype.element_ty), mask=j < width)


@triton.jit(do_not_specialize=["num_pairs"])
def _sort(experts, pairs, chosen, num_pairs, BM: tl.constexpr, B: tl.constexpr):
    """A program for each expert puts its pairs into tiles of BM, in their order; -1 where there is none.

    With p pairs of experts before it, expert e owns the tiles from min(e, p) + p // BM on, up to those of the next one:
    as many as it fills or more, however the others fare, and `num_tiles` together."""
    own = tl.program_id(0)
    i = tl.arange(0, B)
    before = tl.zeros([B], tl.int32)
    equal = tl.zeros([B], tl.int32)
    for start in range(0, num_pairs, B):
        expert = tl.load(chosen + start + i, mask=start + i < num_pairs, other=0x7FFFFFFF)
        before += (expert < own).to(tl.int32)
        equal += (expert == own).to(tl.int32)
    num_before, count = tl.sum(before, 0), tl.sum(equal, 0)
    behind = num_before + count
    first = tl.minimum(own, num_before) + num_before // BM
    num_filled = (count + BM - 1) // BM
    for tile in range(first, tl.minimum(own + 1, behind) + behind // BM):
        tl.store(experts + tile, tl.where(tile < first + num_filled, own, -1))
    if count == 0:
        return
    pairs += first * BM
    m = count + tl.arange(0, BM)
    tl.store(pairs + m, -1, mask=m < num_filled * BM)
    for start in range(0, num_pairs, B):
        is_own = (tl.load(chosen + start + i, mask=start + i < num_pairs, other=-1) == own).to(tl.int32)
        tl.store(pairs + tl.cumsum(is_own, 0) - 1, start + i, mask=is_own != 0)
        pairs += tl.sum(is_own, 0)


@triton.jit
def _multiply_pairs(
    out, x, w, experts, pairs, x_t, w_n, o_t, size, N: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, TILED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`out[pair]`: the pair's expert times `x[pair // COUNT]`; with `GATED` SiLU of its first N rows times the others.
    `w` has `size` rows, those of all experts one behind the other, and is a descriptor of tiles with `TILED`."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    pair = tl.load(pairs + tile * BM + tl.arange(0, BM))
    rows = x + (tl.maximum(pair, 0) // COUNT).to(tl.int64)[:, None] * x_t + k[None, :]
    first = expert * (2 * N if GATED else N) + tl.program_id(0) * BN
    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32)
    for i in tl.range(0, (K + BK - 1) // BK):
        inside = (pair >= 0)[:, None] & (i * BK + k < K)[None, :]
        factor = tl.load(rows + i * BK, mask=inside, other=0.0).to(C).T
        acc = tl.dot(tile_of(w, first, i * BK, w_n, size, K, BN, BK, TILED).to(C), factor, acc, input_precision="ieee")
        if GATED:
            other = tile_of(w, first + N, i * BK, w_n, size, K, BN, BK, TILED).to(C)
            up = tl.dot(other, factor, up, input_precision="ieee")
    if GATED:
        acc = silu(acc) * up
    inside = (n < N)[:, None] & (pair >= 0)[None, :]
    tl.store(out + pair.to(tl.int64)[None, :] * o_t + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_shares(out, parts, shares, residual, r_t, o_t, N: tl.constexpr, COUNT: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    y = tl.load(residual + row * r_t + i, mask=i < N, other=0.0).to(tl.float32)
    for j in tl.static_range(COUNT):
        pair = row * COUNT + j
        part = tl.load(parts + pair * N + i, mask=i < N, other=0.0).to(tl.float32)
        y += tl.load(shares + pair).to(tl.float32) * part
    tl.store(out + row * o_t + i, y.to(out.dtype.element_ty), mask=i < N)


def choose(logits: Tensor, count: int, *, normalise: bool, has_shared: bool = False) -> tuple[Tensor, Tensor]:
    """Experts int32 [T, count] by falling probability, of equal ones the first, and their shares in the type of logits
    [T, E]: of the softmax in float32, with `normalise` divided by their sum. With `has_shared` the last logit is that
    of one more, which comes last in every row, by its sigmoid.

    Raises ValueError for rows that are not dense, and for more than there are."""
    num_rows, num_experts = len(logits), logits.shape[1] - has_shared
    check(logits.stride(1) == 1 and 0 < count <= num_experts, f"dense rows of at least {count} experts", logits)
    experts = torch.empty(num_rows, count + has_shared, dtype=torch.int32, device=logits.device)
    shares = torch.empty(experts.shape, dtype=logits.dtype, device=logits.device)
    early = num_rows == 1 and starts_early(logits)
    launch(
        _choose_experts, (num_rows,), logits, experts, shares, logits.stride(0), num_experts,
        power_of_two(num_experts), count, power_of_two(count + has_shared), normalise, has_shared, early, num_warps=1,
        early=early,
    )  # fmt: skip
    return experts, shares


def multiply(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """[T, H] of x's dtype: `residual` and, of each row of x [T, H], what its experts make of it, times their shares.

    Expert e is SiLU of `gate_up[e, :I]` times `gate_up[e, I:]`, then `down[e]`: [E, 2 I, H] and [E, H, I]. `chosen` and
    `shares` are [T, k], as from `choose`. `out` may be the residual's memory. Raises ValueError for shapes that do not
    fit, and for tensors that are not dense."""
    num_experts, size, inner = down.shape
    check(
        gate_up.shape == (num_experts, 2 * inner, size) and x.shape[1] == size, "weights must fit x", x, gate_up, down
    )
    check(x.dtype == gate_up.dtype == down.dtype, "rows and weights must be of one type", x, gate_up, down)
    check(len(x) == len(chosen) and chosen.shape == shares.shape, "experts and shares for each row", x, chosen, shares)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check(out.shape == residual.shape == x.shape, "residual and result must fit x", x, residual, out)
    check(all(y.stride(1) == 1 for y in (x, residual, out)), "rows must be dense", x, residual, out)
    dense = (gate_up, down, chosen, shares)
    check(all(y.is_contiguous() for y in dense), "weights, experts and shares must be dense", *dense)
    add = add_alone if len(x) <= MOST_ALONE else _add_sorted
    add(out, x, gate_up, down, chosen, shares, residual)
    return out


def _add_sorted(
    out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, shares: Tensor, residual: Tensor
) -> None:
    size, count, inner = x.shape[1], chosen.shape[1], down.shape[2]
    rows = rows_for(chosen.numel() / len(down), x.itemsize, is_roomy=is_roomy(x))
    tiles = sort_pairs(chosen, len(down), rows)
    h, parts = (torch.empty(chosen.numel(), n, dtype=x.dtype, device=x.device) for n in (inner, size))
    _multiply_tiles(h, x, gate_up, *tiles, rows, count, is_gated=True)
    _multiply_tiles(parts, h, down, *tiles, rows, 1, is_gated=False)
    add_shares(out, parts, shares, residual)


def add_shares(out: Tensor, parts: Tensor, shares: Tensor, residual: Tensor) -> None:
    """`residual` [T, N] and, of each row, what its experts made of it, [T * k, N], times their shares [T, k]."""
    (num_rows, size), count = out.shape, shares.shape[1]
    block = min(power_of_two(size, 128), 1024)
    launch(
        _add_shares, (num_rows, -(-size // block)), out, parts, shares, residual, residual.stride(0), out.stride(0),
        size, count, block, num_warps=4,
    )  # fmt: skip


def rows_for(mean: float, itemsize: int, *, is_roomy: bool) -> int:
    """Pairs of a tile, by the mean of an expert's; up to some 200 of them reading its weight is what counts. Sums of
    more in float32 have no room in registers."""
    if mean <= 8 or itemsize > 2:
        return 16
    return 128 if mean > 64 and is_roomy else 64


def tile_for(rows: int, itemsize: int, *, is_roomy: bool, is_gated: bool) -> Tile:
    """Each warp takes 16 rows of the weight. Cut as products of `skinny.py` are; no mixture has been timed yet."""
    columns = 128 // itemsize
    if rows > 64:
        return Tile(rows, columns, 8, 4 if is_gated else 3)
    if is_gated or not is_roomy:
        return Tile(rows, columns, 4, 3 if rows == 64 and is_gated else 4)
    return Tile(rows, 2 * columns, 4, 3)


def sort_pairs(chosen: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Of each tile its expert, and its pairs [tiles * rows]."""
    num_pairs = chosen.numel()
    num_tiles = min(num_experts, num_pairs) + num_pairs // rows
    experts, pairs = (torch.empty(n, dtype=torch.int32, device=chosen.device) for n in (num_tiles, num_tiles * rows))
    launch(_sort, (num_experts,), experts, pairs, chosen, num_pairs, rows, 1024, num_warps=4)
    return experts, pairs


def _multiply_tiles(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    experts: Tensor,
    pairs: Tensor,
    rows: int,
    count: int,
    *,
    is_gated: bool,
) -> None:
    tile = tile_for(rows, x.itemsize, is_roomy=is_roomy(x), is_gated=is_gated)
    size, depth, tall = out.shape[1], x.shape[1], 16 * tile.warps
    weight = weight.view(-1, depth)
    is_tiled = has_tiles(x) and can_multiply(weight)
    factor: Any = TensorDescriptor.from_tensor(weight, [tall, tile.columns]) if is_tiled else weight
    launch(
        _multiply_pairs, (-(-size // tall), len(experts)), out, x, factor, experts, pairs, x.stride(0),
        weight.stride(0), out.stride(0), len(weight), size, depth, count, tall, rows, tile.columns, is_gated, is_tiled,
        compute_type(x.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
