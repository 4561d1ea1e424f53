"""Attention without a mask inside packed segments: the ViT's frames and windows.

A head whose channels are not a power of two is cut in two parts, 80 = 64 + 16: padded to 128 it would cost 60 % more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dashinfer_vlm.kernels.cuda.launch import Tile, check, compute_type, launch, power_of_two, unit_of

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
    """Strides of q, k and v come in units, so that the compiler knows that rows of 72 channels begin at 16 bytes."""
    q_t *= UNIT
    q_h *= UNIT
    k_t *= UNIT
    k_h *= UNIT
    v_t *= UNIT
    v_h *= UNIT
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
    place = out + at[:, None] * o_t + head * o_h
    inside = mine[:, None] if DA <= D else mine[:, None] & (a < D)[None, :]
    tl.store(place + a[None, :], (acc_a / total[:, None]).to(out.dtype.element_ty), mask=inside)
    if DB > 0:
        b = DA + tl.arange(0, DB)
        inside = mine[:, None] & (b < D)[None, :]
        tl.store(place + b[None, :], (acc_b / total[:, None]).to(out.dtype.element_ty), mask=inside)


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
    tile = tile_for(q.dtype, dim, is_short=len(k) < TALL * (len(starts) - 1))
    tiles = _tiles(starts, first_query, first_query + num_queries, tile.rows)
    strides = [*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]]
    unit = unit_of(*strides)
    launch(
        _attend, (num_heads, len(tiles)), q, k, v, tiles, out, scale, first_query, *(x // unit for x in strides),
        *out.stride()[:2], dim, *parts_of(dim), tile.rows, tile.columns, unit, compute_type(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return out


def tile_for(dtype: torch.dtype, dim: int, *, is_short: bool) -> Tile:
    """`is_short` for windows, whose segments are shorter than a tall tile. With 128 registers two programs share a
    multiprocessor, and one multiplies while the other does its softmax: the fastest on an H200 for heads of 80
    (docs/log.md). What does not fit then is kept elsewhere before and after the loop over keys, not within it.

    In 16 bits never one stage: values then take the place of keys, whose address ptxas 12.8 forgets (docs/log.md)."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if is_short:
        return Tile(64, 32, 4, 2)
    if dim <= 80:
        return Tile(TALL, 64, 8, 3, registers=128)
    return Tile(TALL, 64, 4, 3)
