"""8-bit floats (e4m3): activations rounded row by row or in groups of columns, as they are or as a norm or SiLU makes
them, and products with weights whose scales belong to blocks. Products with a scale per row are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import INTERPRETED, check, launch, power_of_two
from dashinfer_vlm.kernels.cuda.rows import magnitudes, normed, silu_times_up

__all__ = ["BLOCK", "block_product", "quantise", "rms_norm", "silu_mul"]

BLOCK = 128
"""Rows and columns that share a scale of a weight, and columns that share one of a row of activations."""
TOP = 448.0
"""The largest number that there is."""
SCALE_ROWS = 256
"""Scales are followed by memory up to a multiple of so many: torch's product reads it, though it uses nothing of it
(pytorch/pytorch#133334)."""


@triton.jit
def _nearest(x):
    """To the nearest 8-bit float, ties to even: what a card's cast does, and the interpreter's does not."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # a float32 of that size has the spacing of the smallest numbers, 2 ** -9
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def _rounded(x, largest, TOP: tl.constexpr, CUTS: tl.constexpr):
    """8-bit floats as float32, and their scale, which is NaN where one of them is: of the largest of `magnitudes`, of
    x's shape or of what broadcasts to it."""
    largest = largest.to(tl.float32, bitcast=True)
    scale = tl.where(largest < 1e-12, 1e-12, largest) / TOP  # unlike a maximum, which is never NaN
    q = tl.minimum(tl.maximum(tl.div_rn(x, tl.zeros(x.shape, tl.float32) + scale), -TOP), TOP)
    if CUTS:
        q = _nearest(q)
    return q, scale


@triton.jit
def _store(x, out, scales, first, K, WIDTH: tl.constexpr, B: tl.constexpr, TOP: tl.constexpr, CUTS: tl.constexpr):
    """Rounds columns `first + arange(B)` of a row, zeros behind K: in groups of WIDTH, or as one where that does not
    divide B."""
    column = first + tl.arange(0, B)
    if B % WIDTH != 0:
        q, scale = _rounded(x, tl.max(magnitudes(x), 0), TOP, CUTS)
        tl.store(scales, scale)
    else:
        groups = tl.reshape(x, [B // WIDTH, WIDTH])
        q, scale = _rounded(groups, tl.max(magnitudes(groups), 1, keep_dims=True), TOP, CUTS)
        q = tl.reshape(q, [B])
        group = first // WIDTH + tl.arange(0, B // WIDTH)[:, None]
        tl.store(scales + group, scale, mask=group * WIDTH < K)
    tl.store(out + column, q.to(out.dtype.element_ty), mask=column < K)


@triton.jit
def _quantise(
    x_rows, out, scales, x_t, o_t, s_t, K, WIDTH: tl.constexpr, B: tl.constexpr, TOP: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * B
    column = first + tl.arange(0, B)
    x = tl.load(x_rows + row * x_t + column, mask=column < K, other=0.0).to(tl.float32)
    _store(x, out + row * o_t, scales + row * s_t, first, K, WIDTH, B, TOP, CUTS)


@triton.jit
def _silu_mul(
    x_rows, out, scales, x_t, o_t, s_t, K, WIDTH: tl.constexpr, B: tl.constexpr, TOP: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * B
    column = first + tl.arange(0, B)
    x = silu_times_up(x_rows + row * x_t + column, K, column < K)
    _store(x, out + row * o_t, scales + row * s_t, first, K, WIDTH, B, TOP, CUTS)


@triton.jit
def _rms_norm(
    x_rows, weight, out, scales, eps, x_t, o_t, s_t, K: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr,
    TOP: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    x = normed(x_rows + row * x_t + i, weight + i, eps, i < K, K)
    _store(x, out + row * o_t, scales + row * s_t, 0, K, WIDTH, B, TOP, CUTS)


@triton.jit(do_not_specialize=["T"])
def _multiply(
    x, x_scales, w, w_scales, out, T, x_t, xs_t, w_n, ws_n, o_t, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    mine = m < T
    x_places = x + m.to(tl.int64)[:, None] * x_t + k[None, :]
    w_places = w + n.to(tl.int64)[None, :] * w_n + k[:, None]
    scale_places = w_scales + (n // BLOCK_ROWS) * ws_n
    acc = tl.zeros([BM, BN], tl.float32)
    for group in range((K + BK - 1) // BK):
        left = K - group * BK
        a = tl.load(x_places + group * BK, mask=mine[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(w_places + group * BK, mask=(n < N)[None, :] & (k < left)[:, None], other=0.0)
        if WIDEN:  # the interpreter multiplies no 8-bit floats
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        of_rows = tl.load(x_scales + m * xs_t + group, mask=mine, other=0.0)
        of_columns = tl.load(scale_places + group, mask=n < N, other=0.0)
        acc += tl.dot(a, b) * of_rows[:, None] * of_columns[None, :]
    place = out + m.to(tl.int64)[:, None] * o_t + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=mine[:, None] & (n < N)[None, :])


def quantise(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """`layers.fp8.quantise` of [T, K], rows may be strided."""
    check(x.ndim == 2 and x.stride(1) == 1, "rows must be dense", x)
    return _by_groups(_quantise, x, x.shape[1], group)


def silu_mul(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """`quantise` of what `rows.silu_mul` makes of [T, 2 K], in one launch; rows may be strided."""
    check(x.ndim == 2 and x.stride(1) == 1, "rows must be dense", x)
    return _by_groups(_silu_mul, x, x.shape[1] // 2, group)


def rms_norm(x: Tensor, weight: Tensor, eps: float, group: int = 0) -> tuple[Tensor, Tensor]:
    """`quantise` of what `rows.rms_norm` makes of [T, K], in one launch; rows may be strided. `group` is a power of
    two."""
    check(x.ndim == 2 and x.stride(1) == 1 and weight.shape == x.shape[1:], "rows must be dense", x, weight)
    depth = x.shape[1]
    width, block = group or depth, power_of_two(depth, group)
    out, scales = _empty(len(x), depth, -(-depth // width), x.device)
    launch(
        _rms_norm, (len(x),), x, weight, out, scales, eps, x.stride(0), depth, scales.stride(0), depth, width, block,
        TOP, INTERPRETED, num_warps=_warps(block),
    )  # fmt: skip
    return out, scales


def _by_groups(kernel: Any, x: Tensor, depth: int, group: int) -> tuple[Tensor, Tensor]:
    width = group or depth
    block = min(power_of_two(depth, group), 1024) if group else power_of_two(depth)
    out, scales = _empty(len(x), depth, -(-depth // width), x.device)
    launch(
        kernel, (len(x), -(-depth // block)), x, out, scales, x.stride(0), depth, scales.stride(0), depth, width, block,
        TOP, INTERPRETED, num_warps=_warps(block),
    )  # fmt: skip
    return out, scales


def _empty(num_rows: int, depth: int, num_groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    out = torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(-(-num_rows // SCALE_ROWS) * SCALE_ROWS, num_groups, dtype=torch.float32, device=device)
    return out, scales[:num_rows]


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def block_product(x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`layers.fp8.block_product`: [T, N] of `dtype`."""
    (num_rows, depth), size = x.shape, len(weight)
    wanted = (-(-size // BLOCK), -(-depth // BLOCK))
    check(weight_scales.shape == wanted, f"scales of the weight must be {wanted}", weight, weight_scales)
    check(scales.shape == (num_rows, wanted[1]), f"scales of the rows must be [T, {wanted[1]}]", x, scales)
    check(x.stride(1) == weight.stride(1) == 1, "rows must be dense", x, weight)
    out = torch.empty(num_rows, size, dtype=dtype, device=x.device)
    height, width = 64, 128
    launch(
        _multiply, (-(-size // width), -(-num_rows // height)), x, scales, weight, weight_scales, out, num_rows,
        x.stride(0), scales.stride(0), weight.stride(0), weight_scales.stride(0), size, size, depth, height, width,
        BLOCK, BLOCK, INTERPRETED, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
