"""Embedding, norms and activations: one launch each, one read and one write of every number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import check, launch, power_of_two

__all__ = [
    "add_rms_norm",
    "embed",
    "layer_norm",
    "magnitudes",
    "norm_scale",
    "norm_times",
    "normed",
    "quick_gelu",
    "rms_norm",
    "scaled",
    "sigmoid_mul",
    "silu_mul",
    "silu_times",
    "silu_times_up",
]


@triton.jit
def magnitudes(x):
    """|x| of float32 as the whole numbers of its bits, whose order is the same, with NaN above all: a largest of floats
    passes over NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def norm_scale(x, eps, N: tl.constexpr):
    """What RMSNorm multiplies a row with."""
    return tl.rsqrt(tl.sum(x * x, 0) / N + eps)


@triton.jit
def scaled(x, scale, w, kind: tl.constexpr):
    """A part of a row of `kind` times its `norm_scale` and the norm's weight; all float32."""
    rounded = (x * scale).to(kind).to(tl.float32)  # as the reference, which multiplies in x's type
    return (rounded * w).to(kind).to(tl.float32)


@triton.jit
def norm_times(x, w, eps, kind: tl.constexpr, N: tl.constexpr):
    """RMSNorm of a row of `kind`, rounded as the reference rounds it; all float32."""
    return scaled(x, norm_scale(x, eps, N), w, kind)


@triton.jit
def normed(x_places, w_places, eps, inside, N: tl.constexpr):
    """`norm_times` of a row and its weight in memory."""
    x = tl.load(x_places, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_places, mask=inside, other=0.0).to(tl.float32)
    return norm_times(x, w, eps, x_places.dtype.element_ty, N)


@triton.jit
def silu_times(gate, up, kind: tl.constexpr):
    """SiLU of gates times ups, rounded to `kind` as the reference does it; all float32."""
    silu = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
    return (silu * up).to(kind).to(tl.float32)


@triton.jit
def silu_times_up(x_places, N, inside):
    """SiLU of gates times ups, which stand N columns behind, rounded as the reference does it, as float32."""
    gate = tl.load(x_places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_places + N, mask=inside, other=0.0).to(tl.float32)
    return silu_times(gate, up, x_places.dtype.element_ty)


@triton.jit
def _shifted(x_places, shift_places, inside, SHIFTED: tl.constexpr):
    """A row in float32, and what its stream lacks."""
    x = tl.load(x_places, mask=inside, other=0.0).to(tl.float32)
    return x + tl.load(shift_places, mask=inside, other=0.0) if SHIFTED else x


@triton.jit
def _rms_norm(
    x_rows, weight, shift, out, eps, x_t, o_t, N: tl.constexpr, B: tl.constexpr, SHIFTED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    w = tl.load(weight + i, mask=i < N, other=0.0).to(tl.float32)
    x = _shifted(x_rows + row * x_t + i, shift + i, i < N, SHIFTED)
    y = norm_times(x, w, eps, x_rows.dtype.element_ty, N)
    tl.store(out + row * o_t + i, y.to(out.dtype.element_ty), mask=i < N)


@triton.jit
def _add_rms_norm(
    x_rows, parts, weight, out, eps, x_t, p_split, p_t, o_t, N: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Adds parts to a row, and norms it."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    kind = x_rows.dtype.element_ty
    w = tl.load(weight + i, mask=i < N, other=0.0).to(tl.float32)
    x = tl.load(x_rows + row * x_t + i, mask=i < N, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        x += tl.load(parts + part * p_split + row * p_t + i, mask=i < N, other=0.0)
    x = x.to(kind)
    tl.store(x_rows + row * x_t + i, x, mask=i < N)
    y = norm_times(x.to(tl.float32), w, eps, kind, N)
    tl.store(out + row * o_t + i, y.to(kind), mask=i < N)


@triton.jit
def _layer_norm(
    x_rows, weight, bias, shift, out, eps, x_t, o_t, N: tl.constexpr, B: tl.constexpr, SHIFTED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    x = _shifted(x_rows + row * x_t + i, shift + i, i < N, SHIFTED)
    apart = tl.where(i < N, x - tl.sum(x, 0) / N, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, 0) / N + eps)
    w = tl.load(weight + i, mask=i < N, other=0.0).to(tl.float32)
    b = tl.load(bias + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(out + row * o_t + i, (apart * scale * w + b).to(out.dtype.element_ty), mask=i < N)


@triton.jit
def _silu_mul(x_rows, out, x_t, o_t, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    y = silu_times_up(x_rows + row * x_t + i, N, i < N)
    tl.store(out + row * o_t + i, y.to(out.dtype.element_ty), mask=i < N)


@triton.jit
def _quick_gelu(x_rows, out, x_t, o_t, N: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    x = tl.load(x_rows + row * x_t + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(out + row * o_t + i, (x / (1 + tl.exp(-1.702 * x))).to(out.dtype.element_ty), mask=i < N)


@triton.jit
def _sigmoid_mul(x_rows, gates, x_t, x_h, g_t, g_h, N: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    head = i // D
    place = x_rows + row * x_t + head * x_h + i % D
    gate = tl.load(gates + row * g_t + head * g_h + i % D, mask=i < N, other=0.0).to(tl.float32)
    kind = x_rows.dtype.element_ty
    sigmoid = (1 / (1 + tl.exp(-gate))).to(kind).to(tl.float32)  # rounded as the reference does it
    x = tl.load(place, mask=i < N, other=0.0).to(tl.float32)
    tl.store(place, (x * sigmoid).to(kind), mask=i < N)


@triton.jit
def _embed(
    ids,
    table,
    staged,
    is_item,
    out,
    e_n,
    s_t,
    N: tl.constexpr,
    B: tl.constexpr,
    STAGED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    inside = i < N
    if STAGED:
        item = tl.load(is_item + row) != 0
        place = tl.where(item, 0, tl.load(ids + row)) * e_n
        x = tl.load(table + place + i, mask=inside & (item == 0), other=0.0).to(out.dtype.element_ty)
        y = tl.load(staged + row * s_t + i, mask=inside & item, other=0.0).to(out.dtype.element_ty)
        x = tl.where(item, y, x)
    else:
        x = tl.load(table + tl.load(ids + row) * e_n + i, mask=inside, other=0.0).to(out.dtype.element_ty)
    tl.store(out + row * N + i, x, mask=inside)


def embed(
    ids: Tensor, table: Tensor, dtype: torch.dtype, staged: Tensor | None = None, is_item: Tensor | None = None
) -> Tensor:
    """`layers.embed.embed`: [T, hidden] of `dtype` in one launch; rows of items read no word."""
    check(table.stride(1) == 1 and (staged is None or staged.stride(1) == 1), "rows must be dense", table)
    size = table.shape[1]
    out = torch.empty(len(ids), size, dtype=dtype, device=ids.device)
    block = min(power_of_two(size, 128), 1024)
    is_staged = staged is not None and is_item is not None
    sources = (staged, is_item) if is_staged else (table, ids)
    launch(
        _embed, (len(ids), -(-size // block)), ids, table, *sources, out, table.stride(0),
        staged.stride(0) if staged is not None else 0, size, block, is_staged, num_warps=4,
    )  # fmt: skip
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, shift: Tensor | None = None
) -> Tensor:
    """`layers.norm.rms_norm` of [T, C], rows may be strided; `out` may be x."""
    _check_rows(x, weight, *_shifts(shift))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    num_rows, size = x.shape
    block = power_of_two(size)
    launch(
        _rms_norm, (num_rows,), x, weight, weight if shift is None else shift, out, eps, x.stride(0), out.stride(0),
        size, block, shift is not None, num_warps=_warps(block),
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x [T, C], to which the sum of float32 `parts` [n, T, C] is added first, in its memory."""
    _check_rows(x, weight)
    check(parts.shape[1:] == x.shape and parts.stride(2) == 1, "parts must be dense rows as long as x", x, parts)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = x.shape
    block = power_of_two(size)
    launch(
        _add_rms_norm, (num_rows,), x, parts, weight, out, eps, x.stride(0), *parts.stride()[:2], out.stride(0), size,
        block, len(parts), num_warps=_warps(block),
    )  # fmt: skip
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None, *, shift: Tensor | None = None
) -> Tensor:
    """`layers.norm.layer_norm` of [T, C], rows may be strided; `out` may be x."""
    _check_rows(x, weight, bias, *_shifts(shift))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    num_rows, size = x.shape
    block = power_of_two(size)
    launch(
        _layer_norm, (num_rows,), x, weight, bias, weight if shift is None else shift, out, eps, x.stride(0),
        out.stride(0), size, block, shift is not None, num_warps=_warps(block),
    )  # fmt: skip
    return out


def silu_mul(x: Tensor) -> Tensor:
    """`layers.activation.silu_mul`: [T, 2 N] of gates, then ups -> [T, N]; rows may be strided."""
    _check_rows(x)
    size = x.shape[1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    _elementwise(_silu_mul, x, out)
    return out


def quick_gelu(x: Tensor) -> Tensor:
    """`layers.activation.quick_gelu` of [T, N], in place: a product that nobody else needs."""
    _check_rows(x)
    _elementwise(_quick_gelu, x, x)
    return x


def sigmoid_mul(x: Tensor, gates: Tensor) -> Tensor:
    """`layers.activation.sigmoid_mul` of [T, H, D], any strides before D."""
    check(x.shape == gates.shape and x.ndim == 3, "gates must be [T, H, D], as x is", x, gates)
    check(x.stride(2) == gates.stride(2) == 1, "channels must be dense", x, gates)
    num_rows, num_heads, dim = x.shape
    size = num_heads * dim
    block = min(power_of_two(size, 128), 1024)
    launch(
        _sigmoid_mul, (num_rows, -(-size // block)), x, gates, *x.stride()[:2], *gates.stride()[:2], size, dim, block,
        num_warps=4,
    )  # fmt: skip
    return x


def _elementwise(kernel: triton.JITFunction, x: Tensor, out: Tensor) -> None:
    size = out.shape[1]
    block = min(power_of_two(size, 128), 1024)
    launch(kernel, (len(out), -(-size // block)), x, out, x.stride(0), out.stride(0), size, block, num_warps=4)


def _check_rows(x: Tensor, *vectors: Tensor) -> None:
    check(x.ndim == 2 and x.stride(1) == 1, "rows must be dense", x)
    check(all(v.shape == x.shape[1:] for v in vectors), "weights must be as long as the rows", x, *vectors)


def _shifts(shift: Tensor | None) -> tuple[Tensor, ...]:
    """None or one; float32."""
    if shift is None:
        return ()
    check(shift.dtype == torch.float32, "a shift must be float32", shift)
    return (shift,)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)
