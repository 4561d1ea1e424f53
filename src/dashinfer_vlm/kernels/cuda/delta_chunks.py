"""The gated delta rule over chunks of rows: what the rows of a chunk change in the memory is found at once.

Each change depends on those before it, so that they solve a triangular system, and it is linear in the memory that the
chunk begins with (Yang et al. 2024): `changes - lookups @ memory`, where both factors are known without the memory. So
one launch prepares all chunks side by side, and another walks through the chunks of each sequence with products alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import Tile, compute_type, launch, power_of_two
from dashinfer_vlm.kernels.cuda.paged import tile_of
from dashinfer_vlm.kernels.delta_net import DeltaNet

__all__ = ["by_chunks", "gated", "prepare_tile", "rates_of", "walk_tile"]


@triton.jit
def rates_of(rates, speed, bias, H: tl.constexpr, mine):
    """How much of each row is learnt, and the logarithm of what is kept; rows that are not `mine` do neither."""
    learnt = tl.load(rates, mask=mine, other=0.0).to(tl.float32)
    x = tl.load(rates + H, mask=mine, other=0.0).to(tl.float32) + tl.load(bias)
    softplus = tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))
    return tl.where(mine, 1 / (1 + tl.exp(-learnt)), 0.0), tl.where(mine, tl.load(speed) * softplus, 0.0)


@triton.jit
def gated(x, z, w, eps, kind: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    """RMSNorm of heads of `N` numbers along `AXIS`, rounded as the reference rounds it, times SiLU of their gates."""
    x = x.to(kind).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, AXIS, keep_dims=True) / N + eps)
    y = ((x * scale).to(kind).to(tl.float32) * w).to(kind).to(tl.float32)
    return y * (z / (1 + tl.exp(-z))).to(kind).to(tl.float32)


@triton.jit
def _inverse(system, N: tl.constexpr, LEVELS: tl.constexpr, F: tl.constexpr):
    """(1 + system)^-1 of a strictly lower triangular [N, N], N = 2^LEVELS: of the blocks on the diagonal, which are
    twice as large each time. That is substitution: no powers grow that cancel out. Factors are `F`: where rows are
    those of a delta rule, none is beyond 1."""
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, N)[None, :]
    inverse = (i == j).to(tl.float32) - tl.where(i // 2 == j // 2, system, 0.0)
    for level in tl.static_range(1, LEVELS):
        half = i // 2**level
        other = j // 2**level
        below = tl.where((half // 2 == other // 2) & (half != other), system, 0.0)
        moved = tl.dot(inverse.to(F), below.to(F), input_precision="ieee")
        inverse -= tl.dot(moved.to(F), inverse.to(F), input_precision="ieee")
    return inverse


@triton.jit(do_not_specialize=["num_sequences"])
def _prepare(
    mixed, rates, speed, bias, starts, changes, lookups, shares, left, later, num_sequences, m_t, r_t,
    HK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, LEVELS: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of a head of a chunk: what rows would change in an empty memory, what they take off that by what they find in it,
    the shares of the changes in what rows read, and what is left of the memory, and of a change at the end."""
    head = tl.program_id(1)
    s, local = tile_of(starts, tl.program_id(0), num_sequences, BR, 1, True)
    first = tl.load(starts + s)
    n = tl.load(starts + tl.minimum(s + 1, num_sequences)) - first
    if local >= n:
        return
    key = head // (H // HK)
    r = tl.arange(0, BR)
    i = r[:, None]
    j = r[None, :]
    d = tl.arange(0, KP)[None, :]
    mine = r < n - local
    at = (first + local + r).to(tl.int64)
    row = mixed + at[:, None] * m_t
    k = tl.load(row + (HK + key) * K + d, mask=mine[:, None] & (d < K), other=0.0).to(C)
    beta, decay = rates_of(rates + at * r_t + head, speed + head, bias + head, H, mine)
    total = tl.cumsum(decay.to(tl.float64), 0)  # of hundreds, small differences are wanted
    high = total.to(tl.float32)
    low = (total - high).to(tl.float32)
    since = tl.where(i >= j, tl.exp((high[:, None] - high[None, :]) + (low[:, None] - low[None, :])), 0.0)
    kept = tl.exp(high)
    of_head = at * H + head
    tl.store(left + of_head, kept, mask=mine)
    tl.store(later + of_head, tl.exp((tl.min(total, 0) - total).to(tl.float32)), mask=mine)
    q = tl.load(row + key * K + d, mask=mine[:, None] & (d < K), other=0.0).to(C)
    share = tl.dot(q, tl.trans(k), input_precision="ieee") * since
    tl.store(shares + of_head[:, None] * BR + j, share.to(shares.dtype.element_ty), mask=mine[:, None])
    system = tl.dot(k, tl.trans(k), input_precision="ieee") * beta[:, None] * since
    solved = _inverse(tl.where(i > j, system, 0.0), BR, LEVELS, F).to(C)
    # part by part saves registers; of one width, since ptxas mixes up layouts of shared memory (sass.raw_descriptors)
    for begin in tl.static_range(0, max(KP, VP), BC):
        c = begin + tl.arange(0, BC)[None, :]
        in_v = mine[:, None] & (c < V)
        v = tl.load(row + 2 * HK * K + head * V + c, mask=in_v, other=0.0).to(tl.float32)
        change = tl.dot(solved, (v * beta[:, None]).to(C), input_precision="ieee")
        tl.store(changes + of_head[:, None] * V + c, change.to(changes.dtype.element_ty), mask=in_v)
        in_k = mine[:, None] & (c < K)
        part = tl.load(row + (HK + key) * K + c, mask=in_k, other=0.0).to(tl.float32)
        lookup = tl.dot(solved, (part * (beta * kept)[:, None]).to(C), input_precision="ieee")
        tl.store(lookups + of_head[:, None] * K + c, lookup.to(lookups.dtype.element_ty), mask=in_k)


@triton.jit
def _walk(
    mixed, changes, lookups, shares, left, later, memory, seats, starts, contexts, out, m_t, o_t, s_s,
    HK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BR: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Part of a head's memory through all chunks of a sequence; what rows read of it, as it is."""
    s = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(starts + s)
    n = tl.load(starts + s + 1) - first
    if n <= 1:
        return
    key = head // (H // HK)
    r = tl.arange(0, BR)
    d = tl.arange(0, KP)
    e = tl.program_id(2) * BV + tl.arange(0, BV)[None, :]
    inside = (d < K)[:, None] & (e < V)
    place = memory + tl.load(seats + s) * s_s + (head * K + d[:, None]) * V + e
    state = tl.load(place, mask=inside & (tl.load(contexts + s) > n), other=0.0)
    for local in tl.range(0, n, BR):
        mine = r < n - local
        at = (first + local + r).to(tl.int64)
        of_head = at * H + head
        in_row = mine[:, None] & (d < K)[None, :]
        q = tl.load(mixed + at[:, None] * m_t + key * K + d[None, :], mask=in_row, other=0.0)
        k = tl.load(mixed + at[:, None] * m_t + (HK + key) * K + d[None, :], mask=in_row, other=0.0)
        lookup = tl.load(lookups + of_head[:, None] * K + d[None, :], mask=in_row, other=0.0)
        share = tl.load(shares + of_head[:, None] * BR + r[None, :], mask=mine[:, None], other=0.0)
        change = tl.load(changes + of_head[:, None] * V + e, mask=mine[:, None] & (e < V), other=0.0).to(tl.float32)
        kept = tl.load(left + of_head, mask=mine, other=0.0)
        at_end = tl.load(later + of_head, mask=mine, other=0.0)
        last = (first + tl.minimum(local + BR, n) - 1).to(tl.int64)
        found = state.to(C)
        change -= tl.dot(lookup.to(C), found, input_precision="ieee")
        y = tl.dot(q.to(C), found, input_precision="ieee") * kept[:, None]
        y = tl.dot(share.to(C), change.to(C), y, input_precision="ieee")
        tl.store(out + at[:, None] * o_t + head * V + e, y.to(out.dtype.element_ty), mask=mine[:, None] & (e < V))
        state *= tl.load(left + last * H + head)
        state = tl.dot(tl.trans(k).to(C), (change * at_end[:, None]).to(C), state, input_precision="ieee")
    tl.store(place, state, mask=inside)


@triton.jit(do_not_specialize=["num_sequences"])
def _gate(
    out, gate, gains, eps, starts, num_sequences, o_t, g_t, V: tl.constexpr, VP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What a head's rows have read of the memory, normed and gated in its place."""
    head = tl.program_id(1)
    s, local = tile_of(starts, tl.program_id(0), num_sequences, BR, 1, True)
    first = tl.load(starts + s)
    n = tl.load(starts + tl.minimum(s + 1, num_sequences)) - first
    if local >= n:
        return
    at = (first + local + tl.arange(0, BR)).to(tl.int64)[:, None]
    e = tl.arange(0, VP)[None, :]
    inside = (tl.arange(0, BR) < n - local)[:, None] & (e < V)
    place = out + at * o_t + head * V + e
    x = tl.load(place, mask=inside, other=0.0)
    z = tl.load(gate + at * g_t + head * V + e, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(gains + e, mask=e < V, other=0.0).to(tl.float32)
    y = gated(x, z, w, eps, out.dtype.element_ty, V, 1)
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


def prepare_tile(dtype: torch.dtype) -> Tile:
    """Rows of a chunk, and columns of keys and values that are multiplied at a time; three programs of 16 bits fit a
    multiprocessor."""
    return Tile(32, 32, 4, 1) if dtype == torch.float32 else Tile(64, 64, 4, 1, 168)


def walk_tile(dtype: torch.dtype) -> Tile:
    """Rows of a chunk, as they are prepared, and columns of a memory."""
    return Tile(32, 16, 4, 1) if dtype == torch.float32 else Tile(64, 32, 4, 2)


def by_chunks(
    mixed: Tensor,
    gate: Tensor,
    rates: Tensor,
    net: DeltaNet,
    memory: Tensor,
    seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> None:
    """`out` of all sequences of more than one row; `mixed` is what the convolution gives."""
    (num_rows, dtype), num_sequences = (len(mixed), mixed.dtype), len(context_lens)
    heads, dims = (net.num_key_heads, net.num_value_heads), (net.key_dim, net.value_dim)
    key_dim, value_dim = (power_of_two(dim, 16) for dim in dims)
    factors = torch.float32 if dtype == torch.float32 else torch.float16
    prepared, walked = prepare_tile(dtype), walk_tile(dtype)
    rows, part = prepared.rows, min(value_dim, walked.columns)
    of_rows = [torch.empty(num_rows, heads[1], n, dtype=dtype, device=mixed.device) for n in (*dims[::-1], rows)]
    kept = [torch.empty(num_rows, heads[1], dtype=torch.float32, device=mixed.device) for _ in range(2)]
    tiles = num_rows // rows + min(num_sequences, num_rows // 2)
    launch(
        _prepare, (tiles, heads[1]), mixed, rates, net.speed, net.rate_bias, query_starts, *of_rows, *kept,
        num_sequences, mixed.stride(0), rates.stride(0), *heads, dims[0], key_dim, dims[1], value_dim, rows,
        prepared.columns, rows.bit_length() - 1, compute_type(factors), compute_type(dtype),
        num_warps=prepared.warps, maxnreg=prepared.registers,
    )  # fmt: skip
    launch(
        _walk, (num_sequences, heads[1], -(-value_dim // part)), mixed, *of_rows, *kept, memory, seats, query_starts,
        context_lens, out, mixed.stride(0), out.stride(0), memory.stride(0), *heads, dims[0], key_dim, dims[1], part,
        rows, compute_type(dtype), num_warps=walked.warps, num_stages=walked.stages,
    )  # fmt: skip
    launch(
        _gate, (tiles, heads[1]), out, gate, net.gains, net.eps, query_starts, num_sequences, out.stride(0),
        gate.stride(0), dims[1], value_dim, rows, num_warps=4,
    )  # fmt: skip
