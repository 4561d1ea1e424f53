"""Mixtures of experts in 8 or 4 bits, with a scale for each row of a weight and 128 columns.

As in `experts.py`: the bits of a tile become factors in registers, as in `skinny.py`, and one or two rows by themselves
are multiplied as by `narrow.py`. Rows stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashinfer_vlm.kernels.cuda import narrow
from dashinfer_vlm.kernels.cuda.experts import add_shares, sort_pairs
from dashinfer_vlm.kernels.cuda.experts_alone import MOST_ALONE
from dashinfer_vlm.kernels.cuda.few_bits import of_bytes, of_high_halves, of_low_halves, shifts_of
from dashinfer_vlm.kernels.cuda.launch import (
    Tile,
    check,
    compute_type,
    has_tiles,
    is_roomy,
    launch,
    starts_early,
    wait_for_last,
)
from dashinfer_vlm.kernels.cuda.narrow import times_groups
from dashinfer_vlm.kernels.cuda.rows import silu_mul
from dashinfer_vlm.kernels.cuda.skinny import can_multiply, tile_of
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = ["multiply"]


@triton.jit(do_not_specialize=["around"])
def _times_pair(
    out, x, w, scales, shifts, chosen, around, x_t, w_n, s_n, o_t, N, K: tl.constexpr, COUNT: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr, GATED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """As `_multiply_pairs`; with `GATED` SiLU of the first N rows of an expert times the others."""
    pair = tl.program_id(1).to(tl.int64)
    wait_for_last(EARLY)
    first = tl.load(chosen + pair).to(tl.int64) * (2 * N if GATED else N)
    x += pair // COUNT * x_t
    times_groups(
        x, x, w + first * w_n, scales + first * s_n, shifts + first * s_n, x, x, out + pair * o_t, 0.0, around, w_n,
        s_n, N, K, K, BN, G, BITS, SHIFTED, False, GATED, False, False, False,
    )  # fmt: skip


@triton.jit
def _multiply_pairs(
    out, x, w, scales, shifts, experts, pairs, x_t, w_n, s_n, o_t, size, N: tl.constexpr, K: tl.constexpr,
    COUNT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr,
    TILED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """See `experts._multiply_pairs`. Shifts are added to numbers in registers, which holds exactly: sums of rows, as in
    `skinny.py`, would come from anywhere."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    rounds: tl.constexpr = (K + 127) // 128
    width: tl.constexpr = 64 if BITS == 4 else 128  # of what a row of the weight has for a round
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, width)
    pair = tl.load(pairs + tile * BM + tl.arange(0, BM)).to(tl.int64)
    rows = x + (tl.maximum(pair, 0) // COUNT)[:, None] * x_t + k[None, :]
    of_row = (expert * N + tl.minimum(n, N - 1)).to(tl.int64) * s_n
    scale = tl.load(scales + of_row).to(tl.float32)
    shift = tl.load(shifts + of_row)
    acc = tl.zeros([BN, BM], tl.float32)
    for i in tl.range(0, rounds):
        following = of_row + tl.minimum(i + 1, rounds - 1)  # scales are asked for a round before they are needed
        next_scale = tl.load(scales + following).to(tl.float32)
        next_shift = tl.load(shifts + following) if SHIFTED else shift
        factor = _part(rows, pair, k, i * 128, K, C)
        first = expert * N + tl.program_id(0) * BN
        weight = tile_of(w, first, i * width, w_n, size, rounds * width, BN, width, TILED)
        if BITS == 8:
            part = tl.dot(of_bytes(weight, C), factor, input_precision="ieee")
        else:
            low, high = of_low_halves(weight, C), of_high_halves(weight, C)
            if SHIFTED:
                low += shift.to(C)[:, None]
                high += shift.to(C)[:, None]
            part = tl.dot(low, factor, input_precision="ieee")
            part = tl.dot(high, _part(rows, pair, k, i * 128 + 64, K, C), part, input_precision="ieee")
        acc += part * scale[:, None]
        scale = next_scale
        shift = next_shift
    inside = (n < N)[:, None] & (pair >= 0)[None, :]
    tl.store(out + pair[None, :] * o_t + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _part(rows, pair, k, first, K: tl.constexpr, C: tl.constexpr):
    """Columns `first + k` of the rows of pairs, transposed."""
    inside = (pair >= 0)[:, None] & (first + k < K)[None, :]
    return tl.load(rows + first, mask=inside, other=0.0).to(C).T


def multiply(
    x: Tensor,
    gate_up: GroupedWeight,
    down: GroupedWeight,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """See `experts.multiply`. Matrices of the experts stand one above the other: [E * 2 I, H] and [E * H, I]. Raises
    ValueError for shapes that do not fit, and for tensors that are not dense."""
    size, inner = x.shape[1], down.depth
    num_experts = len(down.numbers) // size
    fits = len(down.numbers) == num_experts * size and len(gate_up.numbers) == num_experts * 2 * inner
    check(fits and gate_up.depth == size, "weights must fit x", x, gate_up.numbers, down.numbers)
    check(len(x) == len(chosen) and chosen.shape == shares.shape, "experts and shares for each row", x, chosen, shares)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check(out.shape == residual.shape == x.shape, "residual and result must fit x", x, residual, out)
    check(all(y.stride(1) == 1 for y in (x, residual, out)), "rows must be dense", x, residual, out)
    dense = (gate_up.numbers, gate_up.scales, down.numbers, down.scales, chosen, shares)
    check(all(y.is_contiguous() for y in dense), "weights, experts and shares must be dense", *dense)
    if len(x) <= MOST_ALONE:
        h = _alone(x, gate_up, chosen, inner, chosen.shape[1], is_gated=True)
        parts = _alone(h, down, chosen, size, 1, is_gated=False)
    else:
        tile = tile_for(chosen.numel() / num_experts, x.itemsize, is_roomy=is_roomy(x))
        pairs = sort_pairs(chosen, num_experts, tile.rows)
        h = silu_mul(_sorted(x, gate_up, 2 * inner, *pairs, tile, chosen.shape[1]))
        parts = _sorted(h, down, size, *pairs, tile, 1)
    add_shares(out, parts, shares, residual)
    return out


def _alone(x: Tensor, weight: GroupedWeight, chosen: Tensor, size: int, count: int, *, is_gated: bool) -> Tensor:
    """[pairs, size]: what the expert of each pair makes of `x[pair // count]`."""
    depth, words = weight.depth, weight.numbers.view(torch.int32)
    out = torch.empty(len(x) * count, size, dtype=x.dtype, device=x.device)
    tile, early = narrow.grouped_tile(size, depth, weight.bits, is_gated=is_gated), starts_early(x)
    launch(
        _times_pair, (-(-size // tile.rows), len(out)), out, x, words, weight.scales, shifts_of(weight), chosen,
        narrow.BYTES if weight.bits == 8 else narrow.NIBBLES, x.stride(0), words.stride(0), weight.scales.stride(0),
        size, size, depth, count, tile.rows, tile.columns // GROUP, weight.bits, weight.shifts is not None, is_gated,
        early, num_warps=tile.warps, early=early,
    )  # fmt: skip
    return out


def tile_for(mean: float, itemsize: int, *, is_roomy: bool) -> Tile:
    """Rows are pairs, by the mean of an expert's; each warp takes 16 rows of the weight. Sums of more pairs in float32
    have no room in registers."""
    if mean <= 8 or itemsize > 2:
        return Tile(16, GROUP, 4, 4)
    return Tile(128, GROUP, 8, 3) if mean > 64 and is_roomy else Tile(64, GROUP, 4, 3)


def _sorted(
    x: Tensor, weight: GroupedWeight, size: int, experts: Tensor, pairs: Tensor, tile: Tile, count: int
) -> Tensor:
    """As `_alone`."""
    numbers, tall = weight.numbers, 16 * tile.warps
    out = torch.empty(len(x) * count, size, dtype=x.dtype, device=x.device)
    is_tiled = has_tiles(x) and can_multiply(numbers)
    factor: Any = numbers
    if is_tiled:
        factor = TensorDescriptor.from_tensor(numbers, [tall, GROUP if weight.bits == 8 else GROUP // 2])
    launch(
        _multiply_pairs, (-(-size // tall), len(experts)), out, x, factor, weight.scales, shifts_of(weight), experts,
        pairs, x.stride(0), numbers.stride(0), weight.scales.stride(0), size, len(numbers), size, weight.depth, count,
        tall, tile.rows, weight.bits, weight.shifts is not None, is_tiled, compute_type(x.dtype), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out
