"""Attention without a mask inside packed segments: the ViT's frames and windows.

A head whose channels are not a power of two is cut in two parts, 80 = 64 + 16: padded to 128 it would cost 60 % more.
Two kernels: `_attend_tall` where the card copies tiles by their descriptors, and segments are as long as its tiles;
`_attend` for windows, float32 and older cards.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from dashinfer_vlm.kernels.cuda.launch import Tile, check, compute_type, has_tiles, launch, power_of_two, unit_of

__all__ = ["TALL", "segment_tiles", "varlen_attention"]

TALL = 128
"""Rows of a tile, where segments are as long."""


@triton.jit
def _load(base, row_offsets, columns, row_mask, D: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr):
    mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns < D)[None, :]
    return tl.load(base + row_offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(C)


@triton.jit
def _load_t(base, row_offsets, columns, row_mask, D: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr):
    mask = row_mask[None, :] if EVEN else row_mask[None, :] & (columns < D)[:, None]
    return tl.load(base + row_offsets[None, :] + columns[:, None], mask=mask, other=0.0).to(C)


@triton.jit
def _store(base, row_offsets, columns, row_mask, x, D: tl.constexpr, EVEN: tl.constexpr):
    mask = row_mask[:, None] if EVEN else row_mask[:, None] & (columns < D)[None, :]
    tl.store(base + row_offsets[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _keys(
    qa, qb, k, v, j, stop, scale, k_t, v_t, top, total, acc_a, acc_b, D: tl.constexpr, DA: tl.constexpr,
    DB: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The running softmax over `BN` keys from j on: largest score (base 2), sum of weights, weighted values. The scale
    rides in what is subtracted, and is no step of its own."""
    t = j + tl.arange(0, BN)
    live = t < stop if MASKED else t >= 0
    at = t.to(tl.int64)
    a = tl.arange(0, DA)
    x = tl.dot(qa, _load_t(k, at * k_t, a, live, D, DA <= D, C), input_precision="ieee")
    if DB > 0:
        b = DA + tl.arange(0, DB)
        x = tl.dot(qb, _load_t(k, at * k_t, b, live, D, DA + DB == D, C), x, input_precision="ieee")
    if MASKED:
        x = tl.where(live[None, :], x, -float("inf"))
    highest = tl.maximum(top, tl.max(x, 1) * scale)
    p = tl.exp2(x * scale - highest[:, None])
    fade = tl.exp2(top - highest)
    total = total * fade + tl.sum(p, 1)
    p = p.to(C)
    acc_a = tl.dot(p, _load(v, at * v_t, a, live, D, DA <= D, C), acc_a * fade[:, None], input_precision="ieee")
    if DB > 0:
        b = DA + tl.arange(0, DB)
        acc_b = tl.dot(p, _load(v, at * v_t, b, live, D, DA + DB == D, C), acc_b * fade[:, None],
                       input_precision="ieee")  # fmt: skip
    return highest, total, acc_a, acc_b


@triton.jit(do_not_specialize=["first_query"])
def _attend(
    q_rows, k, v, tiles, out, scale, first_query, q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, D: tl.constexpr,
    DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Strides come in units, so that the compiler knows that rows of 72 channels begin at 16 bytes."""
    q_t *= UNIT
    q_h *= UNIT
    k_t *= UNIT
    k_h *= UNIT
    v_t *= UNIT
    v_h *= UNIT
    o_t *= UNIT
    o_h *= UNIT
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    row = tl.load(tile)
    end = tl.load(tile + 1)
    start = tl.load(tile + 2)
    stop = tl.load(tile + 3)
    if row >= end:
        return
    rows = row + tl.arange(0, BM)
    mine = rows < end
    at = (rows - first_query).to(tl.int64)
    a = tl.arange(0, DA)
    qa = _load(q_rows + head * q_h, at * q_t, a, mine, D, DA <= D, C)
    acc_a = tl.zeros([BM, DA], tl.float32)
    if DB > 0:
        b = DA + tl.arange(0, DB)
        qb = _load(q_rows + head * q_h, at * q_t, b, mine, D, DA + DB == D, C)
        acc_b = tl.zeros([BM, DB], tl.float32)
    else:
        qb = qa
        acc_b = acc_a
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    k += head * k_h
    v += head * v_h
    base2 = scale * 1.4426950408889634
    whole = start + (stop - start) // BN * BN
    for j in tl.range(start, whole, BN):
        top, total, acc_a, acc_b = _keys(qa, qb, k, v, j, stop, base2, k_t, v_t, top, total, acc_a, acc_b,
                                         D, DA, DB, BN, False, C)  # fmt: skip
    # a loop of one round at most: ptxas 12.8 takes the wrong addresses for the products behind an `if`, see docs/log.md
    for j in tl.range(whole, stop, BN):
        top, total, acc_a, acc_b = _keys(qa, qb, k, v, j, stop, base2, k_t, v_t, top, total, acc_a, acc_b,
                                         D, DA, DB, BN, True, C)  # fmt: skip
    _store(out + head * o_h, at * o_t, a, mine, acc_a / total[:, None], D, DA <= D)
    if DB > 0:
        b = DA + tl.arange(0, DB)
        _store(out + head * o_h, at * o_t, b, mine, acc_b / total[:, None], D, DA + DB == D)


@triton.jit(do_not_specialize=["first_query", "one"])
def _attend_tall(
    q_rows, k, v, k_a, k_b, v_a, v_b, tiles, out, scale, one, first_query, q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """As `_attend`, of two parts that are copied by descriptors; the products for the next scores are under way during
    the softmax of these. Where the second part is wider than what is left of a head, it holds the next head's first
    channels, which meet zeros of q. The last keys of a segment are copied by pointers: by descriptors that ended in
    illegal accesses on an H200 (docs/log.md).

    ptxas lets products be under way only where no register of a sum is touched meanwhile (docs/log.md). So sums fade
    before them; and `one`, which is 1 and which the compiler does not know, uses the last one in its own round."""
    q_t *= UNIT
    q_h *= UNIT
    k_t *= UNIT
    k_h *= UNIT
    v_t *= UNIT
    v_h *= UNIT
    o_t *= UNIT
    o_h *= UNIT
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    row = tl.load(tile)
    end = tl.load(tile + 1)
    start = tl.load(tile + 2)
    stop = tl.load(tile + 3)
    if row >= end:
        return
    rows = row + tl.arange(0, BM)
    mine = rows < end
    at = (rows - first_query).to(tl.int64)
    a = tl.arange(0, DA)
    b = DA + tl.arange(0, DB)
    qa = _load(q_rows + head * q_h, at * q_t, a, mine, D, True, C)
    qb = _load(q_rows + head * q_h, at * q_t, b, mine, D, DA + DB == D, C)
    acc_a = tl.zeros([BM, DA], tl.float32)
    acc_b = tl.zeros([BM, DB], tl.float32)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    scale *= 1.4426950408889634
    first = head * D
    second = first + DA
    whole = start + (stop - start) // BN * BN
    x = tl.dot(qb, k_b.load([start, second]).to(C).T, input_precision="ieee")
    x = tl.dot(qa, k_a.load([start, first]).to(C).T, x, input_precision="ieee")
    for j in tl.range(start, whole, BN):
        later = tl.minimum(j + BN, whole - BN)  # in the last round for scores that nobody wants
        after = tl.dot(qb, k_b.load([later, second]).to(C).T, input_precision="ieee")  # waited for, and x with it
        highest = tl.maximum(top, tl.max(x, 1) * scale)
        fade = tl.exp2(top - highest)
        acc_a *= fade[:, None]
        acc_b *= fade[:, None]
        after = tl.dot(qa, k_a.load([later, first]).to(C).T, after, input_precision="ieee")
        p = tl.exp2(x * scale - highest[:, None])
        total = total * fade + tl.sum(p, 1)
        top = highest
        p = p.to(C)
        acc_a = tl.dot(p, v_a.load([j, first]).to(C), acc_a, input_precision="ieee")
        acc_b = tl.dot(p, v_b.load([j, second]).to(C), acc_b, input_precision="ieee") * one
        x = after
    k += head * k_h
    v += head * v_h
    for j in tl.range(whole, stop, BN):  # one round at most
        t = j + tl.arange(0, BN)
        live = t < stop
        place = t.to(tl.int64)
        x = tl.dot(qa, _load_t(k, place * k_t, a, live, D, True, C), input_precision="ieee")
        x = tl.dot(qb, _load_t(k, place * k_t, b, live, D, DA + DB == D, C), x, input_precision="ieee")
        x = tl.where(live[None, :], x, -float("inf"))
        highest = tl.maximum(top, tl.max(x, 1) * scale)
        p = tl.exp2(x * scale - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(p, 1)
        p = p.to(C)
        acc_a *= fade[:, None]
        acc_b *= fade[:, None]
        acc_a = tl.dot(p, _load(v, place * v_t, a, live, D, True, C), acc_a, input_precision="ieee")
        acc_b = tl.dot(p, _load(v, place * v_t, b, live, D, DA + DB == D, C), acc_b, input_precision="ieee") * one
    _store(out + head * o_h, at * o_t, a, mine, acc_a / total[:, None], D, True)
    _store(out + head * o_h, at * o_t, b, mine, acc_b / total[:, None], D, DA + DB == D)


_TILES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By starts, then by rows and height: every block of a ViT attends within the same segments."""


def _tiles(starts: Tensor, first: int, stop: int, height: int) -> Tensor:
    """`segment_tiles`, made once as long as the starts live; nobody changes them."""
    made: dict[tuple[int, int, int], Tensor] = _TILES.setdefault(starts, {})  # type: ignore[no-untyped-call]
    if (first, stop, height) not in made:
        made[first, stop, height] = segment_tiles(starts, first, stop, height)
    return made[first, stop, height]


def segment_tiles(starts: Tensor, first: int, stop: int, height: int) -> Tensor:
    """int32 [n, 4] on the device of `starts`, without a wait: the first row of a tile, the end of its rows, and the
    segment's start and stop; for rows `first .. stop` of the packed ones. Surplus tiles at the end have no rows.

    `starts` is int32 [N + 1], as in `varlen_attention`; a tile has at most `height` rows, all of one segment.
    """
    begins, ends = starts[:-1].clamp(first, stop), starts[1:].clamp(first, stop)
    counts = (ends - begins + height - 1) // height
    last = counts.cumsum(0, dtype=torch.int32)
    bound = (stop - first) // height + len(begins)  # what the host knows without looking
    index = torch.arange(bound, dtype=torch.int32, device=starts.device)
    n = torch.searchsorted(last, index, right=True).clamp(max=len(begins) - 1)
    row = begins[n] + (index - last[n] + counts[n]) * height
    end = torch.minimum(row + height, ends[n])
    return torch.stack((row, torch.where(index < last[-1], end, row), starts[:-1][n], starts[1:][n]), dim=1)


def parts_of(dim: int) -> tuple[int, int]:
    """Channels of the two parts of a head, each a power of two from 16 on; 0 for no second part."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, power_of_two(dim - first, 16) if dim > first else 0


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    first_query: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """`layers.attention.varlen_attention`: [Q, H, D] of q's dtype. Waits for nothing and reads nothing back.

    Tiles are kept as long as `starts`, which must not change."""
    num_queries, num_heads, dim = q.shape
    check(k.shape == v.shape and k.shape[1:] == q.shape[1:], "q, k and v must agree in heads and channels", q, k, v)
    check(q.stride(2) == k.stride(2) == v.stride(2) == 1, "channels must be dense", q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check(out.stride(2) == 1, "channels must be dense", out)
    if not num_queries or len(starts) < 2:
        return out
    has_short = is_short(len(k), len(starts) - 1)
    is_tiled = not has_short and can_tile(k) and can_tile(v)
    tile = tile_for(q.dtype, dim, is_short=has_short, is_tiled=is_tiled)
    tiles = _tiles(starts, first_query, first_query + num_queries, tile.rows)
    unit = unit_of(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    q_strides, k_strides, v_strides, out_strides = ([n // unit for n in x.stride()[:2]] for x in (q, k, v, out))
    grid = (num_heads, len(tiles))
    start = partial(launch, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers)
    if is_tiled:
        parts = parts_of(dim)
        factors = (TensorDescriptor.from_tensor(x.flatten(1), [tile.columns, n]) for x in (k, v) for n in parts)
        start(
            _attend_tall, grid, q, k, v, *factors, tiles, out, scale, 1.0, first_query, *q_strides, *k_strides,
            *v_strides, *out_strides, dim, *parts, tile.rows, tile.columns, unit, compute_type(q.dtype),
        )  # fmt: skip
    else:
        start(
            _attend, grid, q, k, v, tiles, out, scale, first_query, *q_strides, *k_strides, *v_strides, *out_strides,
            dim, *parts_of(dim), tile.rows, tile.columns, unit, compute_type(q.dtype),
        )  # fmt: skip
    return out


def is_short(num_rows: int, num_segments: int) -> bool:
    """Whether segments are shorter than a tall tile, as windows are."""
    return num_rows < TALL * num_segments


def can_tile(x: Tensor) -> bool:
    """Whether `_attend_tall` is made for these keys or values [P, H, D]: of 16 bits, 65 to 80 channels, as it was timed
    with, heads side by side, and rows where the copy engine can read them: at multiples of 16 bytes. On cards that have
    one."""
    *_, dim = x.shape
    is_aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x.itemsize == 2 and 64 < dim <= 80 and x.stride(1) == dim and is_aligned and has_tiles(x)


def tile_for(dtype: torch.dtype, dim: int, *, is_short: bool, is_tiled: bool) -> Tile:
    """`is_short` for windows, whose segments are shorter than a tall tile; `is_tiled` for `_attend_tall`, the fastest
    of 16 ways on an H200 for heads of 80 and of 72 (docs/log.md). Two programs share a multiprocessor, and one
    multiplies while the other does its softmax.

    In 16 bits never one stage: values then take the place of keys, whose address ptxas 12.8 forgets (docs/log.md)."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if is_short:
        return Tile(64, 32, 4, 2)
    if is_tiled:
        return Tile(TALL, 64, 4, 3)
    if dim <= 80:
        return Tile(TALL, 64, 8, 3, registers=128)
    return Tile(TALL, 64, 4, 3)
