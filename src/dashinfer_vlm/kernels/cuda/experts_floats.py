"""Mixtures of experts in 8-bit floats (e4m3), with a scale per row of a weight or per block of 128 x 128.

As in `experts.py`, but both factors of a tile's products are 8-bit floats: a row is rounded as a whole, by a launch
before gates and ups and by the one that takes SiLU of gates times ups. A scale for fewer columns would gain nothing:
what is so small beside a row's largest number that it loses digits adds nothing to its sums. One or two rows by
themselves stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashinfer_vlm.kernels.cuda import fp8
from dashinfer_vlm.kernels.cuda.experts import add_shares, sort_pairs
from dashinfer_vlm.kernels.cuda.experts_alone import MOST_ALONE, add_alone
from dashinfer_vlm.kernels.cuda.launch import INTERPRETED, Tile, check, has_tiles, launch
from dashinfer_vlm.kernels.cuda.skinny import can_multiply, tile_of
from dashinfer_vlm.kernels.grouped import GROUP

__all__ = ["Stack", "multiply"]


@dataclass(frozen=True, slots=True)
class Stack:
    """One matrix of each expert."""

    numbers: Tensor
    """float8_e4m3fn [E, N, K]."""
    scales: Tensor
    """float32 [E, N, 1], or [E, N / 128, K / 128], those at the edges cut off."""

    @property
    def is_in_blocks(self) -> bool:
        return self.scales.shape[1:] != (self.numbers.shape[1], 1)


@triton.jit
def _multiply_pairs(
    out, x, x_scales, w, w_scales, experts, pairs, x_t, w_n, ws_e, ws_n, o_t, size, N: tl.constexpr, K: tl.constexpr,
    COUNT: tl.constexpr, BM: tl.constexpr, IN_BLOCKS: tl.constexpr, TILED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `experts._multiply_pairs`; the rows of a weight that a program takes are those that may share a scale."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    rounds: tl.constexpr = (K + 127) // 128
    block = tl.program_id(0)
    n = block * 128 + tl.arange(0, 128)
    k = tl.arange(0, 128)
    pair = tl.load(pairs + tile * BM + tl.arange(0, BM)).to(tl.int64)
    row = tl.maximum(pair, 0) // COUNT
    rows = x + row[:, None] * x_t + k[None, :]
    w_scales += expert.to(tl.int64) * ws_e
    of_block = w_scales + block * ws_n
    scale = tl.load(of_block) if IN_BLOCKS else 1.0
    acc = tl.zeros([128, BM], tl.float32)
    for i in tl.range(0, rounds):
        inside = (pair >= 0)[:, None] & (i * 128 + k < K)[None, :]
        factor = tl.load(rows + i * 128, mask=inside, other=0.0).T
        weight = tile_of(w, expert * N + block * 128, i * 128, w_n, size, K, 128, 128, TILED)
        if WIDEN:  # the interpreter multiplies no 8-bit floats
            factor, weight = factor.to(tl.float32), weight.to(tl.float32)
        part = tl.dot(weight, factor)  # the card adds few digits more than a product has: no longer sums are its own
        if IN_BLOCKS:
            following = tl.load(of_block + tl.minimum(i + 1, rounds - 1))  # a round before it is needed
            part *= scale
            scale = following
        acc += part
    if not IN_BLOCKS:
        acc *= tl.load(w_scales + tl.minimum(n, N - 1) * ws_n)[:, None]
    acc *= tl.load(x_scales + row)[None, :]
    inside = (n < N)[:, None] & (pair >= 0)[None, :]
    tl.store(out + pair[None, :] * o_t + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor,
    gate_up: Stack,
    down: Stack,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """See `experts.multiply`. Raises ValueError for shapes that do not fit, and for tensors that are not dense."""
    num_experts, size, inner = down.numbers.shape
    fits = gate_up.numbers.shape == (num_experts, 2 * inner, size) and x.shape[1] == size
    check(fits, "weights must fit x", x, gate_up.numbers, down.numbers)
    for stack in (gate_up, down):
        _check(stack)
    check(inner % GROUP == 0 or not gate_up.is_in_blocks, "no block may have gates and ups", gate_up.numbers)
    check(len(x) == len(chosen) and chosen.shape == shares.shape, "experts and shares for each row", x, chosen, shares)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check(out.shape == residual.shape == x.shape, "residual and result must fit x", x, residual, out)
    check(all(y.stride(1) == 1 for y in (x, residual, out)), "rows must be dense", x, residual, out)
    check(chosen.is_contiguous() and shares.is_contiguous(), "experts and shares must be dense", chosen, shares)
    if len(x) <= MOST_ALONE:
        scales = gate_up.scales, down.scales
        add_alone(out, x, gate_up.numbers, down.numbers, chosen, shares, residual, scales)
    else:
        _add_sorted(out, x, gate_up, down, chosen, shares, residual)
    return out


def _check(stack: Stack) -> None:
    _, num_rows, depth = stack.numbers.shape
    blocks = -(-num_rows // GROUP), -(-depth // GROUP)
    fits = stack.scales.shape[1:] in (blocks, (num_rows, 1)) and len(stack.scales) == len(stack.numbers)
    check(fits, "scales must be those of rows or of blocks", stack.numbers, stack.scales)
    check(stack.numbers.is_contiguous() and stack.scales.is_contiguous(), "weights must be dense", stack.numbers)


def _add_sorted(
    out: Tensor, x: Tensor, gate_up: Stack, down: Stack, chosen: Tensor, shares: Tensor, residual: Tensor
) -> None:
    num_experts, count = len(down.numbers), chosen.shape[1]
    tile = tile_for(chosen.numel() / num_experts)
    pairs = sort_pairs(chosen, num_experts, tile.rows)
    h = _times(*fp8.quantise(x), gate_up, *pairs, tile, count, x.dtype)
    parts = _times(*fp8.silu_mul(h), down, *pairs, tile, 1, x.dtype)
    add_shares(out, parts, shares, residual)


def tile_for(mean: float) -> Tile:
    """Rows are pairs, by the mean of an expert's: the fastest of some on an H200 (docs/log.md)."""
    return Tile(16 if mean <= 16 else 64, GROUP, 4, 3)


def _times(
    x: Tensor,
    scales: Tensor,
    stack: Stack,
    experts: Tensor,
    pairs: Tensor,
    tile: Tile,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """[pairs, N] of `dtype`: what its expert makes of `x[pair // count]`."""
    size, depth = stack.numbers.shape[1:]
    weight = stack.numbers.view(-1, depth)
    out = torch.empty(len(x) * count, size, dtype=dtype, device=x.device)
    is_tiled = has_tiles(x) and can_multiply(weight)
    factor: Any = TensorDescriptor.from_tensor(weight, [GROUP, GROUP]) if is_tiled else weight
    launch(
        _multiply_pairs, (-(-size // GROUP), len(experts)), out, x, scales, factor, stack.scales, experts, pairs,
        x.stride(0), weight.stride(0), *stack.scales.stride()[:2], size, len(weight), size, depth,
        count, tile.rows, stack.is_in_blocks, is_tiled, INTERPRETED, num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return out
