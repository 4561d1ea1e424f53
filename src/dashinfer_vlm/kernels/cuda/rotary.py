"""Rotation by positions, alone (ViT) or together with the write into the paged cache (text model)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.hadamard import hadamard_blocks
from dashinfer_vlm.kernels.cuda.launch import check, compute_type, launch, power_of_two, starts_early, wait_for_last
from dashinfer_vlm.kernels.cuda.rows import magnitudes, scaled
from dashinfer_vlm.kernels.head_norms import HeadNorms

__all__ = ["check_tables", "mrope_cos_sin", "rope", "rope_write_kv", "rotated"]

HEADS_AT_ONCE = 32


@triton.jit(do_not_specialize=["axis_stride"])
def _tables(positions, frequencies, axes, cos, sin, axis_stride, p_t, HALF: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    axis = tl.load(axes + i, mask=i < HALF, other=0)
    position = tl.load(positions + axis * axis_stride + row * p_t, mask=i < HALF, other=0).to(tl.float32)
    angle = position * tl.load(frequencies + i, mask=i < HALF, other=0.0)
    tl.store(cos + row * HALF + i, tl.cos(angle), mask=i < HALF)
    tl.store(sin + row * HALF + i, tl.sin(angle), mask=i < HALF)


@triton.jit
def _partly_turned(
    own, x, channel, cos, sin, gains, scale, inside, R: tl.constexpr, NORM: tl.constexpr, kind: tl.constexpr
):  # fmt: skip
    """Float32 channels of heads at x, of which those below R are turned with the one that is R / 2 apart."""
    half: tl.constexpr = R // 2
    turns = channel < R
    is_low = channel < half
    place = tl.where(is_low, channel, channel - half)
    other = tl.where(is_low, channel + half, channel - half)
    y = tl.load(x + other[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(gains + other, mask=turns, other=0.0).to(tl.float32)
        y = scaled(y, scale, w[None, :], kind)
    c = tl.load(cos + place, mask=turns, other=1.0)[None, :]
    s = tl.load(sin + place, mask=turns, other=0.0)[None, :]
    return own * c + tl.where(is_low[None, :], -y, y) * s


@triton.jit
def rotated(
    x, cos, sin, row, first, x_h, gains, eps, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BH: tl.constexpr,
    BD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Both halves of heads `first ..` of one row, each normed before with `NORM` and its first R channels turned,
    rounded to x's type, with pointers and mask for the lower half."""
    half: tl.constexpr = D // 2
    head = first + tl.arange(0, BH)
    i = tl.arange(0, BD)
    inside = (head < N)[:, None] & (i < half)[None, :]
    x += head[:, None] * x_h
    place = x + i[None, :]
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    kind = x.dtype.element_ty
    scale = low
    if NORM:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / D + eps)[:, None]
        low = scaled(low, scale, tl.load(gains + i, mask=i < half, other=0.0).to(tl.float32)[None, :], kind)
        high = scaled(high, scale, tl.load(gains + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :], kind)
    cos += row * (R // 2)
    sin += row * (R // 2)
    if R < D:
        turned_low = _partly_turned(low, x, i, cos, sin, gains, scale, inside, R, NORM, kind)
        turned_high = _partly_turned(high, x, half + i, cos, sin, gains, scale, inside, R, NORM, kind)
        tl.debug_barrier()  # who stores these in place stores what others have read
    else:
        c = tl.load(cos + i, mask=i < half, other=0.0)[None, :]
        s = tl.load(sin + i, mask=i < half, other=0.0)[None, :]
        turned_low = low * c - high * s
        turned_high = high * c + low * s
    return turned_low.to(kind), turned_high.to(kind), place, inside


@triton.jit
def _rope(x, cos, sin, x_t, x_h, N: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low, high, place, inside = rotated(
        x + row * x_t, cos, sin, row, tl.program_id(1) * BH, x_h, x, 0.0, N, D, D, BH, BD, False
    )
    tl.store(place, low, mask=inside)
    tl.store(place + D // 2, high, mask=inside)


@triton.jit
def _nearest(x):
    """To the nearest whole number, ties to even, for numbers far below 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _write(cache, low, high, head, N: tl.constexpr, D: tl.constexpr, c_h, BD: tl.constexpr, INT8: tl.constexpr):
    """Two halves [heads, D / 2] of rows into their place in the cache."""
    half: tl.constexpr = D // 2
    i = tl.arange(0, BD)
    inside = (head < N)[:, None] & (i < half)[None, :]
    place = cache + head[:, None] * c_h + i[None, :]
    if INT8:
        largest = tl.max(tl.maximum(magnitudes(low), magnitudes(high)), 1).to(tl.float32, bitcast=True)
        inverse = tl.where(largest > 1e-30, tl.div_rn(127.0, tl.where(largest > 1e-30, largest, 1.0)), 0.0)
        low = _nearest(low * inverse[:, None])
        high = _nearest(high * inverse[:, None])
        scale = (cache + head * c_h + D).to(tl.pointer_type(tl.float32))
        tl.store(scale, tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)), mask=head < N)
    tl.store(place, low.to(cache.dtype.element_ty), mask=inside)
    tl.store(place + half, high.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def _mixed(low, high, mixer, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """The transform over both halves: its matrix in four quarters."""
    half: tl.constexpr = D // 2
    i = tl.arange(0, BD)
    inside = (i < half)[:, None] & (i < half)[None, :]
    quarter = mixer + i[:, None] * D + i[None, :]
    low = low.to(C)
    high = high.to(C)
    ll = tl.load(quarter, mask=inside, other=0.0).to(C)
    lh = tl.load(quarter + half, mask=inside, other=0.0).to(C)
    hl = tl.load(quarter + half * D, mask=inside, other=0.0).to(C)
    hh = tl.load(quarter + half * D + half, mask=inside, other=0.0).to(C)
    new_low = tl.dot(high, hl, tl.dot(low, ll, input_precision="ieee"), input_precision="ieee")
    return new_low, tl.dot(high, hh, tl.dot(low, lh, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _rope_write_kv(
    q, k, v, cos, sin, k_cache, v_cache, slots, mixer, q_gains, k_gains, eps, q_t, q_h, k_t, k_h, v_t, v_h,
    slot_stride, c_h, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BH: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, INT8: tl.constexpr, EARLY: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    wait_for_last(EARLY)
    if part > 0:
        q_low, q_high, q_place, in_q = rotated(
            q + row * q_t, cos, sin, row, (part - 1) * BH, q_h, q_gains, eps, H, D, R, BH, BD, NORM
        )
        tl.store(q_place, q_low, mask=in_q)
        tl.store(q_place + D // 2, q_high, mask=in_q)
        return
    slot = tl.load(slots + row) * slot_stride
    head = tl.arange(0, BK)
    k_low, k_high, _, inside = rotated(k + row * k_t, cos, sin, row, 0, k_h, k_gains, eps, HK, D, R, BK, BD, NORM)
    if INT8:
        mixed_low, mixed_high = _mixed(k_low, k_high, mixer, D, BD, C)
        _write(k_cache + slot, mixed_low, mixed_high, head, HK, D, c_h, BD, INT8)
    else:
        _write(k_cache + slot, k_low, k_high, head, HK, D, c_h, BD, INT8)
    place = v + row * v_t + head[:, None] * v_h + tl.arange(0, BD)[None, :]
    v_low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    v_high = tl.load(place + D // 2, mask=inside, other=0.0).to(tl.float32)
    _write(v_cache + slot, v_low, v_high, head, HK, D, c_h, BD, INT8)


def mrope_cos_sin(positions: Tensor, frequencies: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """`layers.rotary.mrope_cos_sin`: [3, T] positions -> float32 [T, D / 2] cosines and sines; any layout of axes."""
    check(frequencies.shape == axes.shape, "frequencies and axes must be [D / 2]", frequencies, axes)
    num_rows, half = positions.shape[1], len(frequencies)
    cos, sin = (torch.empty(num_rows, half, dtype=torch.float32, device=positions.device) for _ in range(2))
    block = power_of_two(half)
    launch(_tables, (num_rows,), positions, frequencies, axes, cos, sin, *positions.stride(), half, block, num_warps=1)
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`layers.rotary.rope`: rotate [T, H, D] in place by float32 tables [T, D / 2]; any strides before D."""
    num_rows, num_heads, dim = x.shape
    check_tables(x, cos, sin)
    heads = min(power_of_two(num_heads), HEADS_AT_ONCE)
    grid = (num_rows, -(-num_heads // heads))
    launch(_rope, grid, x, cos, sin, *x.stride()[:2], num_heads, dim, heads, power_of_two(dim // 2), num_warps=4)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """`layers.attention.rope_write_kv`, in one launch; k is left as it is. With `norms` each head of q and k is normed
    first. Tables of fewer channels than heads have turn the first ones."""
    num_rows, num_heads, dim = q.shape
    num_kv_heads, int8 = k.shape[1], k_cache.dtype == torch.int8
    check_tables(q, cos, sin, whole=False)
    check(k_cache.is_contiguous() and v_cache.is_contiguous(), "the caches must be contiguous", k_cache, v_cache)
    check(k.stride(2) == v.stride(2) == 1, "channels must be dense", k, v)
    heads = min(power_of_two(num_heads), HEADS_AT_ONCE)
    early = num_rows == 1 and starts_early(q)
    mixer = hadamard_blocks(dim, q.device)[0] if int8 else cos
    gains = (cos, cos, 0.0) if norms is None else (norms.queries, norms.keys, norms.eps)  # what is there is not read
    warps = 8 if int8 and dim > 128 else 4
    launch(
        _rope_write_kv, (num_rows, 1 + -(-num_heads // heads)), q, k, v, cos, sin, k_cache, v_cache, slots, mixer,
        *gains, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], k_cache.stride(1), k_cache.stride(2), num_heads,
        num_kv_heads, dim, 2 * cos.shape[1], heads, power_of_two(num_kv_heads, 16 if int8 else 1),
        power_of_two(dim // 2, 16), norms is not None, int8, early, compute_type(q.dtype), num_warps=warps, early=early,
    )  # fmt: skip


def check_tables(x: Tensor, cos: Tensor, sin: Tensor, *, whole: bool = True) -> None:
    """ValueError unless x is [T, H, D] with dense channels, and the tables are its rows', for all channels or, if not
    `whole`, for no more."""
    check(x.stride(2) == 1, "channels must be dense", x)
    num_turned = 2 * cos.shape[1]
    fits = num_turned == x.shape[2] if whole else num_turned <= x.shape[2]
    fits = fits and cos.shape == sin.shape and len(cos) == len(x) and cos.is_contiguous() and sin.is_contiguous()
    check(fits, "tables must be contiguous [T, D / 2]", x, cos, sin)
