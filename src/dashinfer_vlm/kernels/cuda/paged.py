"""Causal grouped-query attention over the paged cache, driven by what lies on the device: no length is read back.

One source, two launches. *Few* is for sequences of at most `FEW_ROWS` rows (decode, guesses): small tiles whose keys
are split over several programs, joined by `_combine`. *Many* is for the rest: tall tiles. A launch leaves the sequences
of the other alone. A tile's row is a pair (query, head of the group), so that a group reads its keys once.
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
    is_roomy,
    launch,
    power_of_two,
    starts_early,
    wait_for_last,
)

__all__ = ["FEW_ROWS", "combine", "few_tile", "num_splits", "over_keys", "paged_attention", "parts_of"]

FEW_ROWS = 8
"""Rows up to which a sequence belongs to the launch with splits."""
WANTED_PROGRAMS = 16 if INTERPRETED else 384
"""At most three for each multiprocessor of a large card, which has room for as many; where they are interpreted, one
after the other."""
STAGES = 5
"""Of a pipeline in which keys are copied two rounds before they are needed, and what the table says of them two rounds
before that. With 3 and 4 the compiler copies that one round before, as the newest of all copies; to wait for it is to
wait for all, and nothing is under way during the arithmetic (tests/kernels/cuda/test_compile.py)."""


@triton.jit
def _sequence_of(starts, tile, num_sequences, BQ: tl.constexpr):
    """The sequence of a tile, by bisection: tiles of sequence s begin at `starts[s] // BQ + s`."""
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BQ + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


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
def over_keys(
    q, k_cache, v_cache, table, j, stop, last, scale, top, total, acc, D: tl.constexpr, DP: tl.constexpr,
    BS: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, BN: tl.constexpr, INT8: tl.constexpr,
    MASKED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The running softmax over `BN` keys from j on: largest score (base 2, finite), sum of weights, weighted values.

    Keys from `stop` on lie anywhere in the pool: no row asks for their scores, and their values are not read, since 0
    times what is there may be NaN."""
    d = tl.arange(0, DP)
    t = j + tl.arange(0, BN)
    live = t < stop
    if BN % BS == 0:  # every tile begins at a block: what a key has in it is the same in all rounds
        entry = j // BS + tl.arange(0, BN) // BS
        slot = tl.arange(0, BN) % BS
    else:
        entry = t // BS
        slot = t % BS
    block = (tl.load(table + entry, mask=live, other=0) if MASKED else tl.load(table + entry)).to(tl.int64)
    at = block * BLOCK + slot * SLOT
    k = _load(k_cache + at[None, :] + d[:, None], live[None, :], d[:, None], D, DP, False)
    x = tl.dot(q, k.to(C), input_precision="ieee")
    if INT8:
        x *= tl.load((k_cache + at + D).to(tl.pointer_type(tl.float32)))[None, :]
    if MASKED:
        x = tl.where(t[None, :] <= last[:, None], x, -float("inf"))
    highest = tl.maximum(top, tl.max(x, 1) * scale)  # the scale rides in what is subtracted, and is no step of its own
    p = tl.exp2(x * scale - highest[:, None])
    fade = tl.exp2(top - highest)
    total = total * fade + tl.sum(p, 1)
    v = _load(v_cache + at[:, None] + d[None, :], live[:, None], d[None, :], D, DP, MASKED)
    if INT8:
        p *= tl.load((v_cache + at + D).to(tl.pointer_type(tl.float32)), mask=live, other=0.0)[None, :]
    acc = tl.dot(p.to(C), v.to(C), acc * fade[:, None], input_precision="ieee")
    return highest, total, acc


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
    if MANY:
        s = _sequence_of(starts, tile, num_sequences, BQ)
        local = (tile - tl.load(starts + s) // BQ - s) * BQ
    else:
        s = tile // ((FEW + BQ - 1) // BQ)
        local = tile % ((FEW + BQ - 1) // BQ) * BQ
    first = tl.load(starts + s)
    n = tl.load(starts + s + 1) - first
    context = tl.load(contexts + s)
    wait_for_last(EARLY)
    if local >= n or (n > FEW) != MANY:
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
    stop = tl.minimum(context, context - n + local + BQ)
    share = tl.cdiv(tl.cdiv(stop, BN), SPLITS) * BN
    begin = split * share
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
            top, total, acc = over_keys(q, k_cache, v_cache, table, j, end, last, base2, top, total, acc, D, DP, BS,
                                    BLOCK, SLOT, BN, INT8, False, C)  # fmt: skip
    for j in tl.range(masked, end, BN):
        top, total, acc = over_keys(q, k_cache, v_cache, table, j, end, last, base2, top, total, acc, D, DP, BS,
                                BLOCK, SLOT, BN, INT8, True, C)  # fmt: skip
    some = tl.where(total > 0, total, 1.0)  # a split may find no key that a row sees
    if SPLITS > 1:  # as many rows as sequences of few rows may have: 32 bits hold their places, and save registers
        at = s * FEW + row
        tl.store(lse + split * l_split + at * l_t + query_head,
                 tl.where(total > 0, top + tl.log2(some), -1e30), mask=mine)  # fmt: skip
    place = out + split * o_split + at[:, None] * o_t + query_head[:, None] * o_h + d[None, :]
    tl.store(place, (acc / some[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["l_split"])
def _combine(
    parts, lse, starts, out, p_split, p_t, p_h, l_split, l_t, o_t, o_h, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, FEW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row and head by their shares of the softmax's sum."""
    s = tl.program_id(0) // FEW
    row = tl.program_id(0) % FEW
    head = tl.program_id(1)
    first = tl.load(starts + s)
    n = tl.load(starts + s + 1) - first
    wait_for_last(EARLY)
    if row >= n or n > FEW:
        return
    at = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SPLITS)
    d = tl.arange(0, DP)
    sums = tl.load(lse + i * l_split + at * l_t + head)
    weights = tl.exp2(sums - tl.max(sums, 0))
    weights = weights / tl.sum(weights, 0)
    x = tl.load(parts + i[:, None] * p_split + at * p_t + head * p_h + d[None, :], mask=(d < D)[None, :], other=0.0)
    joined = tl.sum(x * weights[:, None], 0)
    tl.store(out + (first + row).to(tl.int64) * o_t + head * o_h + d, joined.to(out.dtype.element_ty), mask=d < D)


def few_tile(dtype: torch.dtype, cache: torch.dtype, group: int, dim: int) -> Tile:
    """For at most `FEW_ROWS` rows of a sequence; `group` query heads share a key head of `dim` channels."""
    rows = power_of_two(group, 16)
    if dtype == torch.float32 or dim > 128:
        return Tile(rows, 32, 4, 2)
    return Tile(rows, 64, 4 if cache == torch.int8 else 2, STAGES)


def many_tile(dtype: torch.dtype, cache: torch.dtype, group: int, dim: int, *, is_roomy: bool) -> Tile:
    """For more rows. `is_roomy`: two programs with 112 KiB of shared memory each have room on a multiprocessor."""
    if dtype == torch.float32:
        return Tile(power_of_two(group, 32), 32, 4, 1)
    if dim > 128:
        return Tile(power_of_two(group, 128), 64, 8, 2)
    if cache == torch.int8:
        return Tile(power_of_two(group, 128), 64, 8, STAGES)
    return Tile(power_of_two(group, 64), 64, 4, STAGES if is_roomy else 2)


def num_splits(num_programs: int, max_context: int, keys: int) -> int:
    """A power of two, so that `num_programs` times it fill a card, and every split has a tile of `keys`."""
    wanted = min(WANTED_PROGRAMS // max(num_programs, 1), max_context // keys, 64)
    return power_of_two(wanted + 1) // 2 if wanted > 1 else 1


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
    many programs share the keys of a sequence of few rows; None chooses. Raises ValueError for shapes that do not fit.
    """
    num_rows, num_heads, _ = q.shape
    num_sequences, num_kv_heads = len(context_lens), k_cache.shape[2]
    check(q.stride(2) == 1 and num_heads % num_kv_heads == 0, "q must be [T, H, D] with dense channels", q, k_cache)
    check(k_cache.stride() == v_cache.stride(), "the caches must have one layout", k_cache, v_cache)
    check(len(query_starts) == num_sequences + 1, "query_starts must be [S + 1]", query_starts, context_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if k_cache.dtype == torch.int8:
        q = mixed_queries(q)
    batch = (q, k_cache, v_cache, block_tables, query_starts, context_lens)
    is_decode = num_rows == num_sequences
    if is_decode or num_sequences > 1 or num_rows <= FEW_ROWS:
        _few(*batch, out, scale, 1 if is_decode else FEW_ROWS, splits)
    if num_rows > FEW_ROWS and not is_decode:
        _many(*batch, out, scale)
    return out


def _few(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    out: Tensor,
    scale: float,
    few: int,
    splits: int | None,
) -> None:
    num_heads, num_kv_heads, num_sequences = q.shape[1], k_cache.shape[2], len(contexts)
    group = num_heads // num_kv_heads
    tile = few_tile(q.dtype, k_cache.dtype, group, q.shape[2])
    tiles = -(-few // (tile.rows // group)) * num_sequences
    if splits is None:
        splits = num_splits(num_sequences * num_kv_heads, tables.shape[1] * k_cache.shape[1], tile.columns)
    parts, lse = parts_of(out, num_sequences * few, splits)
    grid = (tiles, num_kv_heads, splits)
    _start(grid, q, k_cache, v_cache, tables, starts, contexts, parts, lse, scale, tile, few, many=False)
    if splits > 1:
        combine(parts, lse, starts, out, few)


def parts_of(out: Tensor, num_rows: int, splits: int) -> tuple[Tensor, Tensor]:
    """Where programs leave what they found for [T, H, D] `out`: weighted values [splits, num_rows, H, D] and logarithms
    of sums [splits, num_rows, H], both float32, for `combine`; where nothing is split, `out` itself."""
    if splits == 1:
        return out[None], out[None, ..., 0]
    parts = torch.empty(splits, num_rows, *out.shape[1:], dtype=torch.float32, device=out.device)
    return parts, torch.empty(parts.shape[:3], dtype=torch.float32, device=out.device)


def combine(parts: Tensor, lse: Tensor, starts: Tensor, out: Tensor, few: int) -> None:
    """The rows of `out` of sequences with at most `few`, the `few` rows of `parts_of` that each has."""
    splits, num_rows, num_heads, dim = parts.shape
    early = len(out) == 1 and starts_early(out)
    launch(
        _combine, (num_rows, num_heads), parts, lse, starts, out, *parts.stride()[:3], *lse.stride()[:2],
        *out.stride()[:2], dim, power_of_two(dim), splits, few, early, num_warps=4, early=early,
    )  # fmt: skip


def _many(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    group = q.shape[1] // k_cache.shape[2]
    tile = many_tile(q.dtype, k_cache.dtype, group, q.shape[2], is_roomy=is_roomy(q))
    grid = (len(q) // (tile.rows // group) + len(contexts), k_cache.shape[2], 1)
    parts = parts_of(out, len(out), 1)
    _start(grid, q, k_cache, v_cache, tables, starts, contexts, *parts, scale, tile, FEW_ROWS, many=True)


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
