"""A row times a weight of 8 or 4 bits or of 8-bit floats, by plain sums, as `gemv` does it for 16 bits.

Reading a weight takes so little time here that making numbers of its bits counts, and instructions that convert are
slower than others. So bits are put where the digits of a float are, behind an exponent that makes them whole numbers,
and what was added by that is taken away again; both are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.few_bits import shifts_of
from dashinfer_vlm.kernels.cuda.gemv import MOST_NORMED, columns_of, result_row
from dashinfer_vlm.kernels.cuda.launch import (
    INTERPRETED,
    Tile,
    check,
    launch,
    power_of_two,
    starts_early,
    wait_for_last,
)
from dashinfer_vlm.kernels.cuda.rows import norm_scale, scaled
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = ["BYTES", "NIBBLES", "grouped_tile", "of_floats", "of_groups", "times_groups"]


BYTES, NIBBLES = 0x47008000, 0x4B000000
"""What is put around the bits: the exponents of 2 ** 15 and 2 ** 23, and for a byte its sign turned, which adds 128.
Kernels get it as an argument, for a constant would be a second instruction: one holds no two of them."""


@triton.jit
def _of_byte(words, b: tl.constexpr, around):
    """Byte b of words of int8, as floats."""
    placed = words << 8 if b == 0 else words >> (8 * b - 8)
    return ((placed & 0xFF00) ^ around).to(tl.float32, bitcast=True) - (32768.0 + 128.0)


@triton.jit
def _of_nibble(words, p: tl.constexpr, around):
    """Nibble p of words of numbers + 8, as floats, 16 ** p times too large, from the fifth on 16 ** (p - 3) times."""
    q: tl.constexpr = p if p < 5 else p - 3
    placed = words if p < 5 else words >> 12
    return ((placed & (15 << (4 * q))) | around).to(tl.float32, bitcast=True) - (8388608.0 + 8 * 16**q)


@triton.jit
def _quarters(x):
    """Every fourth number [1, G, J] of x [G, J, 4], from the first, second, third and fourth on."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0[None], x1[None], x2[None], x3[None]


@triton.jit
def _times(words, x, around, G: tl.constexpr, BITS: tl.constexpr):
    """[BN, G, J]: sums over the numbers of each word, `words` [BN, G, J] times x [G * 128]."""
    if BITS == 8:
        x0, x1, x2, x3 = _quarters(tl.reshape(x, (G, 32, 4)))
        sums = _of_byte(words, 0, around) * x0
        sums += _of_byte(words, 1, around) * x1
        sums += _of_byte(words, 2, around) * x2
        sums += _of_byte(words, 3, around) * x3
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, (G, 2, 16, 4)), (0, 2, 3, 1)))
        x0, x2, x4, x6 = _quarters(low)
        x1, x3, x5, x7 = _quarters(high)
        sums = _of_nibble(words, 0, around) * x0
        sums += _of_nibble(words, 1, around) * (x1 * 0.0625)
        sums += _of_nibble(words, 2, around) * (x2 * 0.00390625)
        sums += _of_nibble(words, 3, around) * (x3 * 0.000244140625)
        sums += _of_nibble(words, 4, around) * (x4 * 1.52587890625e-05)
        sums += _of_nibble(words, 5, around) * (x5 * 0.00390625)
        sums += _of_nibble(words, 6, around) * (x6 * 0.000244140625)
        sums += _of_nibble(words, 7, around) * (x7 * 1.52587890625e-05)
    return sums


@triton.jit
def _groups(places, group, first, GROUPS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr):
    """What lies at `places` [BN, G, ...] from group `first` on, `WIDTH` a group."""
    return tl.load(places + first * WIDTH, mask=first + group < GROUPS, other=0, eviction_policy="evict_first")


@triton.jit
def _columns(x, first, K: tl.constexpr, B: tl.constexpr):
    k = first + tl.arange(0, B)
    return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["around"])
def times_groups(
    x, gains, w, scales, shifts, bias, residual, out, eps, around, w_n, s_n, N, K: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, SHIFTED: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Of a row: see `of_groups`."""
    groups: tl.constexpr = (K + 127) // 128
    width: tl.constexpr = 4 * BITS  # words of a group
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    row = tl.minimum(n, N - 1).to(tl.int64)
    group = tl.arange(0, G)
    of_words = group[None, :, None]
    places = w + row[:, None, None] * w_n + of_words * width + tl.arange(0, width)[None, None, :]
    of_groups = row[:, None] * s_n + group[None, :]
    up_places = places + N.to(tl.int64) * w_n
    of_up_groups = of_groups + N.to(tl.int64) * s_n
    words = _groups(places, of_words, 0, groups, G, width)
    if GATED:
        up_words = _groups(up_places, of_words, 0, groups, G, width)
    wait_for_last(EARLY)
    if NORM:
        scale_of_x = norm_scale(_columns(x, 0, K, WHOLE), eps, K)
    acc = tl.zeros([BN, G, width], tl.float32)
    acc_up = tl.zeros([BN, G, width], tl.float32)
    more = tl.zeros([BN, G], tl.float32)  # what shifts add
    more_up = tl.zeros([BN, G], tl.float32)
    for i in tl.range(0, groups, G):  # the words of the next round are under way
        next_words = _groups(places, of_words, i + G, groups, G, width)
        if GATED:
            next_up_words = _groups(up_places, of_words, i + G, groups, G, width)
        part = _columns(x, i * 128, K, G * 128)
        if NORM:
            part = scaled(part, scale_of_x, _columns(gains, i * 128, K, G * 128), x.dtype.element_ty)
        scale = _groups(scales + of_groups, group[None, :], i, groups, G, 1).to(tl.float32)
        acc += _times(words, part, around, G, BITS) * scale[:, :, None]
        words = next_words
        if SHIFTED:
            sums = tl.sum(tl.reshape(part, (G, 128)), 1)[None, :]
            more += _groups(shifts + of_groups, group[None, :], i, groups, G, 1).to(tl.float32) * scale * sums
        if GATED:
            scale = _groups(scales + of_up_groups, group[None, :], i, groups, G, 1).to(tl.float32)
            acc_up += _times(up_words, part, around, G, BITS) * scale[:, :, None]
            up_words = next_up_words
            if SHIFTED:
                more_up += _groups(shifts + of_up_groups, group[None, :], i, groups, G, 1).to(tl.float32) * scale * sums
    y = tl.sum(tl.sum(acc, 2) + more, 1)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(tl.sum(acc_up, 2) + more_up, 1)
        if BIAS:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
        y = y / (1 + tl.exp(-y)) * up
    if RESIDUAL:
        y += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _floats(
    x, x_scales, w, w_scales, bias, residual, out, w_n, ws_n, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    IN_BLOCKS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BN
    n = first_row + tl.arange(0, BN)
    inside = n < N
    k = tl.arange(0, BK)
    places = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * w_n + k[None, :]
    numbers = columns_of(places, k, 0, K, BK)
    wait_for_last(EARLY)
    acc = tl.zeros([BN, BK], tl.float32)
    for i in tl.range(0, K, BK):  # the numbers of the next round are under way
        following = tl.load(places + i + BK, mask=(i + BK + k < K)[None, :], other=0.0, eviction_policy="evict_first")
        row = _columns(x, i, K, BK)
        if IN_BLOCKS:  # all rows of a program lie in one block
            block = (i + k) // 128
            row *= tl.load(x_scales + block, mask=i + k < K, other=0.0)
            row *= tl.load(w_scales + first_row // 128 * ws_n + block, mask=i + k < K, other=0.0)
        acc += numbers.to(tl.float32) * row[None, :]
        numbers = following
    y = tl.sum(acc, 1)
    if not IN_BLOCKS:
        y *= tl.load(x_scales) * tl.load(w_scales + n * ws_n, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


def of_groups(
    x: Tensor,
    weight: GroupedWeight,
    bias: Tensor | None = None,
    *,
    gains: Tensor | None = None,
    eps: float = 0.0,
    silu_mul: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`skinny.product` of a row [1, K]: [1, N] of `dtype`, else of x's.

    With `gains` [K], of which there are `gemv.MOST_NORMED` at most, x is first normed as by `rows.rms_norm`. Raises
    ValueError for shapes that do not fit."""
    depth, num_rows = weight.depth, len(weight.numbers)
    size = num_rows // 2 if silu_mul else num_rows
    check(x.shape == (1, depth) and x.stride(1) == 1, f"one dense row of {depth}", x)
    check(gains is None or (depth <= MOST_NORMED and gains.shape == (depth,)), "too long for a norm", x)
    check(bias is None or bias.shape == (num_rows,), "a bias must be as long as the weight has rows", weight.numbers)
    check(weight.numbers.is_contiguous(), "numbers must be dense", weight.numbers)
    out = result_row(out, residual, size, dtype or x.dtype, x.device)
    words = weight.numbers.view(torch.int32)
    tile, early = grouped_tile(num_rows, depth, weight.bits, is_gated=silu_mul), starts_early(x)
    launch(
        times_groups, (-(-size // tile.rows),), x, x if gains is None else gains, words, weight.scales,
        shifts_of(weight), x if bias is None else bias, x if residual is None else residual, out, eps,
        BYTES if weight.bits == 8 else NIBBLES, words.stride(0),
        weight.scales.stride(0), size, depth, power_of_two(depth), tile.rows, tile.columns // GROUP, weight.bits,
        weight.shifts is not None, gains is not None, silu_mul, bias is not None, residual is not None, early,
        num_warps=tile.warps, early=early,
    )  # fmt: skip
    return out


def of_floats(
    x: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[1, N] of `dtype`: e4m3 [1, K] times e4m3 [N, K], transposed, plus `bias` [N], rounded, plus `residual`, whose
    memory `out` may be. Scales are float32 [1, 1] and [N, 1], or [1, K / 128] and those of blocks of 128 x 128. Raises
    ValueError for shapes that do not fit."""
    size, depth = weight.shape
    blocks, in_blocks = (-(-size // GROUP), -(-depth // GROUP)), weight_scales.shape != (size, 1)
    check(x.shape == (1, depth) and x.stride(1) == weight.stride(1) == 1, f"one dense row of {depth}", x, weight)
    fits = weight_scales.shape == blocks and scales.shape == (1, blocks[1]) if in_blocks else scales.shape == (1, 1)
    check(fits, "scales must be those of rows or of blocks", scales, weight_scales)
    check(bias is None or bias.shape == (size,), "a bias must be as long as the weight has rows", weight)
    out = result_row(out, residual, size, dtype, x.device)
    tile, early = float_tile(depth), starts_early(x)
    launch(
        _floats, (-(-size // tile.rows),), x, scales, weight, weight_scales, out if bias is None else bias,
        out if residual is None else residual, out, weight.stride(0), weight_scales.stride(0), size, depth, tile.rows,
        tile.columns, in_blocks, bias is not None, residual is not None, early, num_warps=tile.warps, early=early,
    )  # fmt: skip
    return out


def grouped_tile(size: int, depth: int, bits: int, *, is_gated: bool) -> Tile:
    """What of x a thread needs, it takes for all rows of a program: so many of them as registers hold, and as leave a
    large card busy. Long rows are few, and shared by several warps."""
    if INTERPRETED:  # where a program costs more than what it does
        return Tile(32, min(power_of_two(depth, GROUP), 2048), 1, 1)
    more = 1 if bits == 8 else 2
    if depth > MOST_NORMED:
        return Tile(4 * more, 16 * GROUP, 4, 1)
    return Tile((8 if size >= 8192 and not is_gated else 4) * more, 4 * GROUP, 1, 1)


def float_tile(depth: int) -> Tile:
    """All rows of a program lie in one block. As `grouped_tile`."""
    if INTERPRETED:
        return Tile(32, min(power_of_two(depth, GROUP), 2048), 1, 1)
    return Tile(4, 2048, 4, 1) if depth > MOST_NORMED else Tile(4, 512, 1, 1)
