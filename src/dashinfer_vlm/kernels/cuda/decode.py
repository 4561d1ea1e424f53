"""A step of decode alone in one launch: rotation, the write into the paged cache, and attention over it.

The newest key and value of a sequence are taken from its row, older ones from the cache; so no program waits for what
another one writes. As in `paged`, the keys of a sequence are split over several programs; the last of them to be done
joins what all have found. Of one row by itself a launch of its own does that, which starts early.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda import paged, rotary
from dashinfer_vlm.kernels.cuda.arrivals import arrived_of
from dashinfer_vlm.kernels.cuda.launch import check, compute_type, launch, power_of_two, starts_early, wait_for_last
from dashinfer_vlm.kernels.cuda.paged import places_of, weighed
from dashinfer_vlm.kernels.cuda.rotary import rotated
from dashinfer_vlm.kernels.cuda.splits import join, num_splits, parts_of, share_of
from dashinfer_vlm.kernels.head_norms import HeadNorms

__all__ = ["MOST_SHARED", "rope_and_attend"]

REGISTERS = 168
"""Of a thread at the most: so three programs fit a multiprocessor."""
MOST_SHARED = 1024
"""Pairs of row and key head whose keys several programs can share: each has a counter."""


@triton.jit
def _halves(
    x, cos, sin, row, x_h, gains, eps, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BH: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Twice [BH, D / 2]: `N` heads of a row, R of their channels rotated, and normed before with `NORM`."""
    low, high, _, _ = rotated(x, cos, sin, row, 0, x_h, gains, eps, N, D, R, BH, D // 2, NORM)
    return low, high


@triton.jit
def _over_keys(
    q_low, q_high, k_cache, v_cache, table, j, end, scale, top, total, acc, D: tl.constexpr, BS: tl.constexpr,
    BLOCK: tl.constexpr, SLOT: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The running softmax over `BN` keys from j on, of which all before `end` are seen. The halves of queries stay
    apart, as rotation leaves them: each is multiplied by its own half of the keys."""
    half: tl.constexpr = D // 2
    at, live = places_of(table, j, end, BS, BLOCK, SLOT, BN, True)
    k = k_cache + at[None, :] + tl.arange(0, half)[:, None]
    x = tl.dot(q_low, tl.load(k).to(C), input_precision="ieee")
    x = tl.dot(q_high, tl.load(k + half).to(C), x, input_precision="ieee")
    p, fade, top, total = weighed(tl.where(live[None, :], x, -float("inf")), scale, top, total)
    v = tl.load(v_cache + at[:, None] + tl.arange(0, D)[None, :], mask=live[:, None], other=0)
    acc = tl.dot(p.to(C), v.to(C), acc * fade[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def _is_last(result, sums, parts, lse, arrived, split, count, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """Leaves what this program found, and tells whether it is the last of the `count` that share a sequence's keys."""
    m = tl.arange(0, BM)
    tl.store(lse + split * G + m, sums, mask=m < G)
    tl.store(parts + split * (G * D) + m[:, None] * D + tl.arange(0, D)[None, :], result, mask=(m < G)[:, None])
    tl.debug_barrier()  # all of it is written before it is said
    is_last = tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(arrived, 0)  # for the next launch
    return is_last


@triton.jit
def _joined(parts, lse, count, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, SPLITS: tl.constexpr):
    """[BG, D]: what all have found, by their shares of the softmax's sum."""
    at_once: tl.constexpr = min(SPLITS, max(64 // BG, 1))  # asked for together, as registers allow
    g = tl.arange(0, BG)
    top = tl.full([BG], -1e30, tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, D], tl.float32)
    for j in tl.range(0, count, at_once):
        split = j + tl.arange(0, at_once)
        live = (g < G)[:, None] & (split < count)[None, :]
        at = g[:, None] + split[None, :] * G
        sums = tl.load(lse + at, mask=live, other=-float("inf"), cache_modifier=".cg")
        places = parts + at[:, :, None] * D + tl.arange(0, D)[None, None, :]
        part = tl.load(places, mask=live[:, :, None], other=0.0, cache_modifier=".cg")
        weight, fade, top, total = weighed(sums, 1.0, top, total)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 1)
    return acc / total[:, None]


@triton.jit
def _write(result, out, o_h, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    m = tl.arange(0, BM)
    place = out + m[:, None] * o_h + tl.arange(0, D)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(m < G)[:, None])


_FETCH = tl.constexpr(
    """{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"""
)


@triton.jit
def _fetch(
    k_cache, v_cache, table, begin, end, D: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Has keys and values brought into the L2 cache, which are older than this step; nothing waits for them."""
    for j in tl.range(begin, end, BN):
        at, live = places_of(table, j, end, BS, BLOCK, SLOT, BN, True)
        size = tl.full([BN], D * k_cache.dtype.element_ty.primitive_bitwidth // 8, tl.int32)
        for cache in tl.static_range(2):
            place = (k_cache if cache == 0 else v_cache) + at
            tl.inline_asm_elementwise(_FETCH, "=r,l,r,r", [place, size, live.to(tl.int32)], tl.int32, False, 1)


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    q_rows, k_rows, v_rows, cos, sin, q_gains, k_gains, eps, k_cache, v_cache, slots, tables, starts, contexts, out,
    parts, lse, arrived, scale, table_stride, q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, G: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, JOIN: tl.constexpr, NORM: tl.constexpr,
    EARLY: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Splits that are not to `JOIN` leave what they found as `splits.parts_of` the result has it."""
    s = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(starts + s)
    n = tl.load(starts + s + 1) - row
    context = tl.load(contexts + s)
    share = share_of(context, BN, SPLITS)
    begin = split * share
    end = tl.minimum(context - 1, begin + share)
    if EARLY:
        _fetch(k_cache + head * HEAD, v_cache + head * HEAD, tables + s * table_stride, begin, end, D, BS, BLOCK, SLOT,
               BN)  # fmt: skip
    wait_for_last(EARLY)
    if n == 0 or begin >= context:
        return
    at = row.to(tl.int64)
    half: tl.constexpr = D // 2
    i = tl.arange(0, half)[None, :]
    d = tl.arange(0, D)
    q_low, q_high = _halves(q_rows + at * q_t + head * G * q_h, cos, sin, at, q_h, q_gains, eps, G, D, R, BM, NORM)
    q_low = q_low.to(C)
    q_high = q_high.to(C)
    k_cache += head * HEAD
    v_cache += head * HEAD
    table = tables + s * table_stride
    base2 = scale * 1.4426950408889634
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for j in tl.range(begin, end, BN):
        top, total, acc = _over_keys(q_low, q_high, k_cache, v_cache, table, j, end, base2, top, total, acc, D, BS,
                                 BLOCK, SLOT, BN, C)  # fmt: skip
    if begin + share >= context:  # this one sees to the newest key
        kind = k_cache.dtype.element_ty
        place = tl.load(slots + row) * SLOT
        k_low, k_high = _halves(k_rows + at * k_t + head * k_h, cos, sin, at, k_h, k_gains, eps, 1, D, R, 1, NORM)
        k_low = k_low.to(kind)
        k_high = k_high.to(kind)
        v = tl.load(v_rows + at * v_t + head * v_h + d)[None, :].to(kind)
        tl.store(k_cache + place + i, k_low)
        tl.store(k_cache + place + half + i, k_high)
        tl.store(v_cache + place + d[None, :], v)
        x = q_low.to(tl.float32) * k_low.to(tl.float32) + q_high.to(tl.float32) * k_high.to(tl.float32)
        p, fade, top, total = weighed(tl.sum(x, 1)[:, None], base2, top, total)
        acc = acc * fade[:, None] + p * v.to(tl.float32)
    result = acc / total[:, None]
    out += at * o_t + head * G * o_h
    if not JOIN and SPLITS > 1:
        m = tl.arange(0, BM)
        first = (split * tl.num_programs(0) + row) * tl.num_programs(1) * G + head * G
        tl.store(lse + first + m, top + tl.log2(total), mask=m < G)
        tl.store(parts + (first + m)[:, None] * D + d[None, :], result, mask=(m < G)[:, None])
    elif SPLITS > 1:
        pair = s * tl.num_programs(1) + head
        parts += pair * (SPLITS * G * D)
        lse += pair * (SPLITS * G)
        count = tl.cdiv(context, share)
        if _is_last(result, top + tl.log2(total), parts, lse, arrived + pair, split, count, G, D, BM):
            _write(_joined(parts, lse, count, G, D, BG, SPLITS), out, o_h, G, D, BG)
    else:
        _write(result, out, o_h, G, D, BM)


def rope_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    norms: HeadNorms | None = None,
    splits: int | None = None,
) -> Tensor:
    """`layers.ops.Ops.attend`: [T, H, D] of q's dtype. Waits for nothing and reads nothing back.

    Where T equals the number of sequences, each may own one row at most, and all is one launch, of one row two; not
    over a cache of int8, nor with heads of other sizes than 32, 64, 128 and 256. Rows that no sequence owns, and their
    slots, are then neither read nor written. `splits` is as in `paged.paged_attention`. No two calls for one cache may
    be under way at a time. Raises ValueError for shapes that do not fit."""
    num_rows, num_heads, dim = q.shape
    if num_rows != len(context_lens) or k_cache.dtype == torch.int8 or dim not in (32, 64, 128, 256):
        rotary.rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slots, norms)
        return paged.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale, splits)
    num_kv_heads = k_cache.shape[2]
    rotary.check_tables(q, cos, sin, whole=False)
    check(num_heads % num_kv_heads == 0 and k.shape[1] == v.shape[1] == num_kv_heads, "heads must agree", q, k, v)
    check(k_cache.is_contiguous() and v_cache.is_contiguous(), "the caches must be contiguous", k_cache, v_cache)
    check(k.stride(2) == v.stride(2) == 1, "channels must be dense", k, v)
    check(len(query_starts) == num_rows + 1, "query_starts must be [S + 1]", query_starts, context_lens)
    group, early, joins = num_heads // num_kv_heads, num_rows == 1 and starts_early(q), num_rows > 1
    tile = paged.few_tile(q.dtype, k_cache.dtype, group, dim)
    num_pairs = num_rows * num_kv_heads
    if splits is None:
        max_context = block_tables.shape[1] * k_cache.shape[1]
        splits = num_splits(paged.FEW_PROGRAMS, num_pairs, max_context, tile.columns)
    check(
        splits == 1 or not joins or num_pairs <= MOST_SHARED,
        f"at most {MOST_SHARED} pairs of row and head may be shared",
        q,
        k,
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, lse = parts_of(out, splits)
    arrived = arrived_of(k_cache, MOST_SHARED) if joins and splits > 1 else lse
    gains = (cos, cos, 0.0) if norms is None else (norms.queries, norms.keys, norms.eps)  # what is there is not read
    launch(
        _decode, (num_rows, num_kv_heads, splits), q, k, v, cos, sin, *gains, k_cache, v_cache, slots, block_tables,
        query_starts, context_lens, out, parts, lse, arrived, scale, block_tables.stride(0), *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], group, dim, 2 * cos.shape[1], k_cache.shape[1],
        *k_cache.stride()[:3], power_of_two(group, 16), power_of_two(group), tile.columns, splits, joins,
        norms is not None, early, compute_type(q.dtype), num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=REGISTERS, early=early,
    )  # fmt: skip
    if splits > 1 and not joins:
        join(parts, lse, query_starts, context_lens, out, 1, tile.columns, tile.columns)
    return out
