"""Products of few rows of 8-bit floats (e4m3) with a weight of such, cut as in `skinny`: the rows of the weight are the
tall side of a tile, and several programs share its columns where its rows are few.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dashinfer_vlm.kernels.cuda import narrow
from dashinfer_vlm.kernels.cuda.launch import INTERPRETED, check, has_tiles, launch, power_of_two
from dashinfer_vlm.kernels.cuda.skinny import TALL, WIDE, arrived_of, can_multiply, joined, num_splits, tile_of
from dashinfer_vlm.kernels.grouped import GROUP

__all__ = ["MOST_ROWS", "product"]

MOST_ROWS = 64
"""Beyond them torch's product is as quick."""
STAGES = 4


@triton.jit(do_not_specialize=["T"])
def _multiply(
    out, x, w, x_scales, w_scales, bias, residual, parts, arrived, T, x_t, w_n, xs_t, ws_n, r_t, o_t, N: tl.constexpr,
    K: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, IN_BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TILED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`x` and `w` are descriptors of tiles with `TILED`, else pointers."""
    first_n = tl.program_id(0) * BN
    first_m = tl.program_id(1) * BM
    n = first_n + tl.arange(0, BN)
    m = first_m + tl.arange(0, BM)
    rounds: tl.constexpr = (K + 127) // 128
    each: tl.constexpr = (rounds + SPLITS - 1) // SPLITS
    start = tl.program_id(2) * each
    stop = tl.minimum(start + each, rounds)
    of_n = w_scales + tl.minimum(n, N - 1) // (128 if IN_BLOCKS else 1) * ws_n
    of_m = x_scales + tl.minimum(m, T - 1) * xs_t
    scale_n = tl.load(of_n + (start if IN_BLOCKS else 0))
    scale_m = tl.load(of_m + (start if IN_BLOCKS else 0))
    acc = tl.zeros([BN, BM], tl.float32)
    for i in tl.range(start, stop):
        a = tile_of(w, first_n, i * 128, w_n, N, K, BN, 128, TILED)
        b = tile_of(x, first_m, i * 128, x_t, T, K, BM, 128, TILED).T
        if WIDEN:  # the interpreter multiplies no 8-bit floats
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        part = tl.dot(a, b)  # the card adds few digits more than a product has: no sum of its own is longer than this
        if IN_BLOCKS:
            later = tl.minimum(i + 1, stop - 1)  # scales are asked for a round before they are needed
            next_n = tl.load(of_n + later)
            next_m = tl.load(of_m + later)
            part *= scale_n[:, None] * scale_m[None, :]
            scale_n = next_n
            scale_m = next_m
        acc += part
    inside = (n < N)[:, None] & (m < T)[None, :]
    if SPLITS > 1:
        is_last, acc = joined(acc, parts, arrived, SPLITS, BN, BM)
        inside &= is_last
    if not IN_BLOCKS:
        acc *= scale_n[:, None] * scale_m[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        acc = acc.to(out.dtype.element_ty).to(tl.float32)  # as the layer does it whose rows are many
        acc += tl.load(residual + m.to(tl.int64)[None, :] * r_t + n[:, None], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64)[None, :] * o_t + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


def product(
    x: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """[T, N] of `dtype`: e4m3 [T, K] times e4m3 [N, K], transposed, plus `bias` [N], rounded, plus `residual`, whose
    memory `out` may be. A row by itself is `narrow`'s.

    Scales are float32 [T, 1] and [N, 1], or [T, K / 128] and those of blocks of 128 x 128. `splits` is as in
    `skinny.product`. Raises ValueError for shapes that do not fit, and for rows that begin elsewhere than at multiples
    of 16 bytes."""
    if len(x) == 1:
        return narrow.of_floats(x, scales, weight, weight_scales, dtype, bias, residual, out)
    (num_rows, depth), size = x.shape, len(weight)
    blocks, in_blocks = (-(-size // GROUP), -(-depth // GROUP)), weight_scales.shape != (size, 1)
    check(weight.shape[1] == depth, f"the weight has {weight.shape[1]} columns", x)
    check(can_multiply(x) and can_multiply(weight), "rows must be dense and begin at multiples of 16 bytes", x, weight)
    fits = weight_scales.shape == (blocks if in_blocks else (size, 1))
    check(fits and scales.shape == (num_rows, blocks[1] if in_blocks else 1), "scales must be those of rows or blocks",
          scales, weight_scales)  # fmt: skip
    check(residual is None or residual.shape == (num_rows, size), "the residual must fit the result", x)
    rows = power_of_two(min(num_rows, WIDE), 16)
    grid = (-(-size // TALL), -(-num_rows // rows))
    if splits is None:
        splits = num_splits(grid[0] * grid[1], blocks[1])
    out = torch.empty(num_rows, size, dtype=dtype, device=x.device) if out is None else out
    parts = arrived = out  # where nothing is split, not looked at
    if splits > 1:
        parts = torch.empty(grid[0] * grid[1], splits, TALL, rows, dtype=torch.float32, device=x.device)
        arrived = arrived_of(weight)
    factors: tuple[Any, ...] = (x, weight)
    if has_tiles(x):
        factors = tuple(map(TensorDescriptor.from_tensor, factors, ([rows, GROUP], [TALL, GROUP])))
    launch(
        _multiply, (*grid, splits), out, *factors, scales, weight_scales, out if bias is None else bias,
        out if residual is None else residual, parts, arrived, num_rows, x.stride(0), weight.stride(0),
        scales.stride(0), weight_scales.stride(0), 0 if residual is None else residual.stride(0), out.stride(0), size,
        depth, splits, TALL, rows, in_blocks, bias is not None, residual is not None, has_tiles(x), INTERPRETED,
        num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return out
