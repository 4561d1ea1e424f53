"""Numbers of 8 or 4 bits as floats: factors of a product, in registers, or a whole weight at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import check, launch
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = ["expand", "of_bytes", "of_high_halves", "of_low_halves", "shifts_of", "sums_of_groups"]

_FROM_BYTES = tl.constexpr(
    """{ .reg .b32 t, u, s, one; mov.b32 one, 0x3f803f80;
    prmt.b32 t, $2, 0, 0x4140; lop3.b32 u, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 s, t, 0x00800080, 0xc300c300, 0xea;
    fma.rn.bf16x2 $0, u, one, s;
    prmt.b32 t, $2, 0, 0x4342; lop3.b32 u, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 s, t, 0x00800080, 0xc300c300, 0xea;
    fma.rn.bf16x2 $1, u, one, s; }"""
)
"""Four numbers of int8 as bfloat16: seven bits behind the exponent of 128, less 128, or 256 where the eighth is set."""
_FROM_LOW_HALVES = tl.constexpr(
    """{ .reg .b32 t, u, s, one; mov.b32 one, 0x3f803f80; mov.b32 s, 0xc308c308;
    prmt.b32 t, $2, 0, 0x4140; lop3.b32 u, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, u, one, s;
    prmt.b32 t, $2, 0, 0x4342; lop3.b32 u, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, u, one, s; }"""
)
"""The low halves of four bytes, less 8: four bits behind the exponent of 128, less 136."""
_FROM_HIGH_HALVES = tl.constexpr(
    """{ .reg .b32 t, u, s, h, one; mov.b32 one, 0x3f803f80; mov.b32 s, 0xc308c308; shr.b32 h, $2, 4;
    prmt.b32 t, h, 0, 0x4140; lop3.b32 u, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, u, one, s;
    prmt.b32 t, h, 0, 0x4342; lop3.b32 u, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, u, one, s; }"""
)


@triton.jit
def _packed(tile, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=r,=r,r", [tile], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def of_bytes(tile, C: tl.constexpr):
    return _packed(tile, _FROM_BYTES) if tl.bfloat16 == C else tile.to(C)


@triton.jit
def of_low_halves(tile, C: tl.constexpr):
    return _packed(tile, _FROM_LOW_HALVES) if tl.bfloat16 == C else ((tile & 15).to(tl.int32) - 8).to(C)


@triton.jit
def of_high_halves(tile, C: tl.constexpr):
    return _packed(tile, _FROM_HIGH_HALVES) if tl.bfloat16 == C else ((tile >> 4).to(tl.int32) - 8).to(C)


@triton.jit
def _expand(w, scales, shifts, out, w_n, s_n, o_n, K, B: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * B + tl.arange(0, B)
    group = k // 128
    if BITS == 8:
        number = tl.load(w + row * w_n + k, mask=k < K, other=0).to(tl.float32)
    else:
        pair = tl.load(w + row * w_n + group * 64 + k % 64, mask=k < K, other=0).to(tl.int32)
        number = (tl.where(k % 128 < 64, pair & 15, pair >> 4) - 8).to(tl.float32)
    if SHIFTED:
        number += tl.load(shifts + row * s_n + group, mask=k < K, other=0.0).to(tl.float32)
    number *= tl.load(scales + row * s_n + group, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + row * o_n + k, number.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def _sum_groups(x, out, x_t, T, K, G: tl.constexpr):
    row = tl.program_id(0)
    group = tl.program_id(1) * G + tl.arange(0, G)
    k = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    numbers = tl.load(x + row.to(tl.int64) * x_t + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + group * T + row, tl.sum(numbers, 1), mask=group * 128 < K)


def sums_of_groups(x: Tensor) -> Tensor:
    """float32 [K / 128, T] of x [T, K]: what shifts of a group are multiplied with."""
    num_rows, depth = x.shape
    out = torch.empty(-(-depth // GROUP), num_rows, dtype=torch.float32, device=x.device)
    grid = (num_rows, -(-len(out) // 16))
    launch(_sum_groups, grid, x, out, x.stride(0), num_rows, depth, 16, num_warps=4)
    return out


def shifts_of(weight: GroupedWeight) -> Tensor:
    """What a kernel is given, which looks at it where there are some. Raises ValueError unless they lie as scales
    do."""
    if weight.shifts is None:
        return weight.scales
    fits = weight.bits == 4 and weight.shifts.stride() == weight.scales.stride()
    check(fits and weight.shifts.shape == weight.scales.shape, "4 bits have a shift for each scale", weight.shifts)
    return weight.shifts


def expand(weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """`layers.grouped.expand`: [N, K] of `dtype` from 8 or 4 bits."""
    size, depth = len(weight.numbers), weight.depth
    out = torch.empty(size, depth, dtype=dtype, device=weight.numbers.device)
    launch(
        _expand, (size, -(-depth // 1024)), weight.numbers, weight.scales, shifts_of(weight), out,
        weight.numbers.stride(0), weight.scales.stride(0), out.stride(0), depth, 1024, weight.bits,
        weight.shifts is not None, num_warps=4,
    )  # fmt: skip
    return out
