"""Causal grouped-query attention over the paged cache, driven by what lies on the device: no length is read back.

One source, two launches. *Few* is for sequences of at most `FEW_ROWS` rows (decode, guesses): small tiles. *Many* is
for the rest: tall tiles. A launch leaves the sequences of the other alone. A tile's row is a pair (query, head of the
group), so that a group reads its keys once. Where tiles are too few for a card, several programs share the keys of
each, by the length of its sequence (`splits.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.hadamard import mixed_queries
from dashinfer_vlm.kernels.cuda.launch import (
    INTERPRETED,
    Tile,
    check,
    compute_type,
    launch,
    power_of_two,
    starts_early,
    wait_for_last,
)
from dashinfer_vlm.kernels.cuda.splits import join, num_splits, parts_of, share_of

__all__ = [
    "FEW_PROGRAMS",
    "FEW_ROWS",
    "few_tile",
    "paged_attention",
    "places_of",
    "tile_of",
    "weighed",
]

FEW_ROWS = 8
"""Rows up to which a sequence belongs to the launch of small tiles."""
FEW_PROGRAMS, MANY_PROGRAMS = (16, 16) if INTERPRETED else (384, 264)
"""At most three and two for each multiprocessor of a large card, which has room for as many; where they are
interpreted, one after the other. The second is of steps with prompts, and bounds what splits find: 64 rows each."""
TALL_PROGRAMS = 200
"""From which on tiles of 128 rows are worth it: 96 took 40.8 us where twice as many of 64 rows took 32.7, 224 took 46.6
against 48.5, and 768 took 551 against 649 (an H200)."""


@triton.jit
def tile_of(starts, tile, num_sequences, BQ: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr):
    """Sequence and first row of one of the tiles of all sequences of more than `FEW` rows, or of all others with `MANY`
    False; the number of sequences where there are not so many tiles."""
    s = 0
    before = 0
    passed = 0
    for j in tl.range(0, num_sequences, 128):
        i = j + tl.arange(0, 128)
        inside = i < num_sequences
        n = tl.load(starts + i + 1, mask=inside, other=0) - tl.load(starts + i, mask=inside, other=0)
        ends = passed + tl.cumsum(tl.where((n > FEW) == MANY, tl.cdiv(n, BQ), 0), 0)
        behind = inside & (ends <= tile)
        s += tl.sum(behind.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(behind, ends, 0), 0))
        passed = tl.max(ends, 0)
    return s, (tile - before) * BQ


@triton.jit
def _load(places, live, d, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows of the cache at `places`, whose `live` and whose channels `d` have the places' shape; masks that are always
    true are not seen through by the compiler."""
    if MASKED:
        return tl.load(places, mask=live & (d < D), other=0) if D < DP else tl.load(places, mask=live, other=0)
    if D == DP:
        return tl.load(places)
    return tl.load(places, mask=d < D, other=0)


@triton.jit
def places_of(
    table, j, stop, BS: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Where `BN` keys from j on lie, and which of them lie before `stop`: others lie anywhere in the pool."""
    t = j + tl.arange(0, BN)
    live = t < stop
    if BN % BS == 0:  # every tile begins at a block: what a key has in it is the same in all rounds
        entry = j // BS + tl.arange(0, BN) // BS
        slot = tl.arange(0, BN) % BS
    else:
        entry = t // BS
        slot = t % BS
    block = (tl.load(table + entry, mask=live, other=0) if MASKED else tl.load(table + entry)).to(tl.int64)
    return block * BLOCK + slot * SLOT, live


@triton.jit
def weighed(x, scale, top, total):
    """A step of the running softmax: weights (base 2) of products x, what earlier ones fade by, and the new largest
    score and sum of weights."""
    highest = tl.maximum(top, tl.max(x, 1) * scale)  # the scale rides in what is subtracted, and is no step of its own
    p = tl.exp2(x * scale - highest[:, None])
    fade = tl.exp2(top - highest)
    return p, fade, highest, total * fade + tl.sum(p, 1)


@triton.jit
def _over_keys(
    q, k_cache, v_cache, table, j, stop, last, scale, top, total, acc, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, BN: tl.constexpr, INT8: tl.constexpr,
    MASKED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The running softmax over `BN` keys from j on: largest score (base 2, finite), sum of weights, weighted values.

    Keys from `stop` on lie anywhere in the pool: no row asks for their scores, and their values are not read, since 0
    times what is there may be NaN."""
    d = tl.arange(0, DP)
    at, live = places_of(table, j, stop, BS, BLOCK, SLOT, BN, MASKED)
    k = _load(k_cache + at[None, :] + d[:, None], live[None, :], d[:, None], D, DP, False)
    x = tl.dot(q, k.to(C), input_precision="ieee")
    if INT8:
        x *= tl.load((k_cache + at + D).to(tl.pointer_type(tl.float32)))[None, :]
    if MASKED:
        x = tl.where((j + tl.arange(0, BN))[None, :] <= last[:, None], x, -float("inf"))
    p, fade, top, total = weighed(x, scale, top, total)
    v = _load(v_cache + at[:, None] + d[None, :], live[:, None], d[None, :], D, DP, MASKED)
    if INT8:
        p *= tl.load((v_cache + at + D).to(tl.pointer_type(tl.float32)), mask=live, other=0.0)[None, :]
    acc = tl.dot(p.to(C), v.to(C), acc * fade[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "l_split"])
def _attend(
    q_rows, k_cache, v_cache, tables, starts, contexts, out, lse, scale, num_sequences, table_stride, q_t, q_h, o_t,
    o_h, o_split, l_t, l_split, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
    BLOCK: tl.constexpr, SLOT: tl.constexpr, HEAD: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr, INT8: tl.constexpr, EARLY: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Strides of the caches are constants, so that a place costs one product and rows are seen to be aligned."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if FEW == 1:
        s = tile
        local = 0
    else:
        s, local = tile_of(starts, tile, num_sequences, BQ, FEW, MANY)
    first = tl.load(starts + s)
    n = tl.load(starts + tl.minimum(s + 1, num_sequences)) - first
    context = tl.load(contexts + tl.minimum(s, num_sequences - 1))
    stop = tl.minimum(context, context - n + local + BQ)
    share = share_of(context, BN, SPLITS)
    begin = split * share
    wait_for_last(EARLY)
    if local >= n or begin >= stop:
        return
    m = tl.arange(0, BM)
    d = tl.arange(0, DP)
    row = local + m // G
    query_head = head * G + m % G
    mine = (row < n) & (m < BQ * G)
    at = (first + row).to(tl.int64)
    inside = mine[:, None] & (d < D)[None, :]
    q = tl.load(q_rows + at[:, None] * q_t + query_head[:, None] * q_h + d[None, :], mask=inside, other=0.0).to(C)
    last = context - n + row
    end = tl.minimum(stop, begin + share)
    top = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    k_cache += head * HEAD
    v_cache += head * HEAD
    table = tables + s * table_stride
    base2 = scale * 1.4426950408889634
    masked = begin  # few rows wait for memory, and once more for each loop, whose copies begin anew
    if MANY:  # products are what these wait for: keys that all of them see are not masked
        seen_by_all = tl.minimum(end, context - n + local + 1)
        masked = begin + tl.maximum(seen_by_all - begin, 0) // BN * BN
        for j in tl.range(begin, masked, BN):
            top, total, acc = _over_keys(q, k_cache, v_cache, table, j, end, last, base2, top, total, acc, D, DP, BS,
                                     BLOCK, SLOT, BN, INT8, False, C)  # fmt: skip
    for j in tl.range(masked, end, BN):
        top, total, acc = _over_keys(q, k_cache, v_cache, table, j, end, last, base2, top, total, acc, D, DP, BS,
                                 BLOCK, SLOT, BN, INT8, True, C)  # fmt: skip
    if SPLITS > 1:  # 32 bits hold places in parts, and save registers
        at = first + row
        tl.store(lse + split * l_split + at * l_t + query_head, top + tl.log2(total), mask=mine)
    place = out + split * o_split + at[:, None] * o_t + query_head[:, None] * o_h + d[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def few_tile(dtype: torch.dtype, cache: torch.dtype, group: int, dim: int) -> Tile:
    """For at most `FEW_ROWS` rows of a sequence; `group` query heads share a key head of `dim` channels."""
    rows = power_of_two(group, 16)
    if dtype == torch.float32 or dim > 128:
        return Tile(rows, 32, 4, 2)
    return Tile(rows, 128, 4, 2)


def many_tile(dtype: torch.dtype, cache: torch.dtype, group: int, dim: int, num_pairs: int) -> Tile:
    """For more rows, of which a step has so many pairs with heads."""
    if dtype == torch.float32:
        return Tile(power_of_two(group, 32), 32, 4, 1)
    if dim > 128:
        return Tile(power_of_two(group, 128), 32 if cache == torch.int8 else 64, 8, 2)
    if cache == torch.int8:
        return Tile(power_of_two(group, 64), 128, 4, 2)
    if num_pairs >= 128 * TALL_PROGRAMS:
        return Tile(power_of_two(group, 128), 64, 8, 2, 128)
    return Tile(power_of_two(group, 64), 64, 4, 2)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """`layers.attention.paged_attention`: [T, H, D] of q's dtype. Waits for nothing and reads nothing back.

    Where T equals the number of sequences, each may own one row at most: such a step is decode alone, and one launch.
    Rows that no sequence owns (equal `query_starts`) are neither read nor written. `splits`, a power of two, is how
    many programs share the keys of a tile; None chooses. Raises ValueError for shapes that do not fit.
    """
    num_rows, num_heads, dim = q.shape
    num_sequences, num_kv_heads = len(context_lens), k_cache.shape[2]
    check(q.stride(2) == 1 and num_heads % num_kv_heads == 0, "q must be [T, H, D] with dense channels", q, k_cache)
    check(k_cache.stride() == v_cache.stride(), "the caches must have one layout", k_cache, v_cache)
    check(len(query_starts) == num_sequences + 1, "query_starts must be [S + 1]", query_starts, context_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if k_cache.dtype == torch.int8:
        q = mixed_queries(q)
    group, is_decode = num_heads // num_kv_heads, num_rows == num_sequences
    few = 1 if is_decode else FEW_ROWS
    kind = (q.dtype, k_cache.dtype, group, dim)
    small, tall = few_tile(*kind), many_tile(*kind, num_rows * num_heads)
    if splits is None:
        told = (FEW_PROGRAMS, num_rows * num_kv_heads) if is_decode else (MANY_PROGRAMS, -(-num_rows * num_heads // 64))
        splits = num_splits(*told, block_tables.shape[1] * k_cache.shape[1], small.columns)
    parts, lse = parts_of(out, splits)
    batch = (q, k_cache, v_cache, block_tables, query_starts, context_lens, parts, lse, scale)
    if is_decode or num_sequences > 1 or num_rows <= FEW_ROWS:
        tiles = min(num_rows, num_sequences * -(-few // (small.rows // group)))
        _start((tiles, num_kv_heads, splits), *batch, small, few, many=False)
    if num_rows > FEW_ROWS and not is_decode:
        tiles = num_rows // (tall.rows // group) + min(num_sequences, num_rows // (FEW_ROWS + 1))
        _start((tiles, num_kv_heads, splits), *batch, tall, few, many=True)
    if splits > 1:
        join(parts, lse, query_starts, context_lens, out, few, small.columns, tall.columns)
    return out


def _start(
    grid: tuple[int, int, int],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    tile: Tile,
    few: int,
    *,
    many: bool,
) -> None:
    """`out` and `lse` are `parts_of` the result."""
    dim, int8 = q.shape[2], k_cache.dtype == torch.int8
    group = q.shape[1] // k_cache.shape[2]
    early = len(q) == 1 and starts_early(q)
    launch(
        _attend, grid, q, k_cache, v_cache, tables, starts, contexts, out, lse, scale, len(contexts), tables.stride(0),
        *q.stride()[:2], *out.stride()[1:3], out.stride(0), lse.stride(1), lse.stride(0), group, dim,
        power_of_two(dim, 16), k_cache.shape[1], *k_cache.stride()[:3], tile.rows, tile.rows // group, tile.columns,
        grid[2], few, many, int8, early, compute_type(q.dtype), num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers, early=early,
    )  # fmt: skip
