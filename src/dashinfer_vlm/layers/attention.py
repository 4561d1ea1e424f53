"""Attention over the paged KV cache (text model) and over packed segments (ViT), in plain torch."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch.nn import functional as F

from dashinfer_vlm.layers.rotary import rope

__all__ = ["cache_row_size", "paged_attention", "rope_write_kv", "varlen_attention", "write_kv"]

_SCALE_BYTES = 4
_SMALLEST_TOP = 1e-30
"""A row with no larger number is zero."""


def cache_row_size(head_dim: int, dtype: torch.dtype, device_type: str = "cpu") -> int:
    """Elements of one head of one token in a cache of `dtype`: behind an int8 row are the 4 bytes of its scale, on a
    card as many as make 16, at multiples of which its loads are wide."""
    if dtype != torch.int8:
        return head_dim
    return head_dim + (16 if device_type == "cuda" else _SCALE_BYTES)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store k and v [T, Hkv, D] at `slots` (int64 [T]: block * block_size + offset) of one layer's contiguous caches
    [num_blocks, block_size, Hkv, cache_row_size(D)], in the caches' dtype.

    int8 rows are rounded to `max |x| / 127` of their token and head. Keys are stored after a Walsh-Hadamard transform,
    which queries take too when they are read: the few channels that a bias makes a hundred times larger than the others
    (as in Qwen2's keys) no longer decide how coarsely all are rounded (QuaRot, Ashkboos et al. 2024).
    """
    if k_cache.dtype == torch.int8:
        k_rows, v_rows = _quantise(_hadamard(k.float())), _quantise(v.float())
    else:
        k_rows, v_rows = k.to(k_cache.dtype), v.to(v_cache.dtype)
    for cache, rows in ((k_cache, k_rows), (v_cache, v_rows)):
        cache.flatten(0, 1)[..., : rows.shape[-1]].index_copy_(0, slots, rows)


def rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """`rope` on q [T, H, D] in place, and `write_kv` of v and of the rotated k, whose memory may be used for it."""
    rope(q, cos, sin)
    rope(k, cos, sin)
    write_kv(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal grouped-query attention of each sequence's queries over its context; [T, H, D] of q's dtype.

    q is [T, H, D] and may be a strided view; sequence s owns rows `query_starts[s] .. query_starts[s + 1]`, which are
    the last tokens of its `context_lens[s]` tokens. The context lies in the blocks `block_tables[s]` (int32 [S, B]) of
    the caches [num_blocks, block_size, Hkv, cache_row_size(D)] that `write_kv` filled, whose dtype may be narrower than
    q's.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if k_cache.dtype == torch.int8:
        q = (_hadamard(q.float()) / _hadamard_size(q.shape[-1])).to(q.dtype)
    block_size = k_cache.shape[1]
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    for s, context in enumerate(contexts):
        rows = slice(starts[s], starts[s + 1])
        blocks = block_tables[s, : -(-context // block_size)].long()
        k = _numbers(k_cache[blocks].flatten(0, 1)[:context], q.shape[-1]).to(q.dtype)
        v = _numbers(v_cache[blocks].flatten(0, 1)[:context], q.shape[-1]).to(q.dtype)
        out[rows] = _grouped_attention(q[rows], k, v, scale)
    return out


def _quantise(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] as int8 [..., D + 4]."""
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > _SMALLEST_TOP, 127 / largest, 0.0)
    return torch.cat(((x * inverse).round().to(torch.int8), (largest / 127).view(torch.int8)), dim=-1)


def _numbers(rows: torch.Tensor, dim: int) -> torch.Tensor:
    """What the rows of a cache stand for; [..., D] as float32 for int8."""
    if rows.dtype != torch.int8:
        return rows
    scales = rows[..., dim : dim + _SCALE_BYTES].clone(memory_format=torch.contiguous_format)  # aligned, as no slice is
    return rows[..., :dim].float() * scales.view(torch.float32)


def _hadamard_size(dim: int) -> int:
    """Channels that one transform mixes; 1 is none. Transforming both factors multiplies their product by this."""
    return dim & -dim if dim % 8 == 0 else 1


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """The transform, not normalised, of every `_hadamard_size(D)` channels of float32 [..., D]."""
    size = _hadamard_size(x.shape[-1])
    return (x.reshape(*x.shape[:-1], -1, size) @ _hadamard_matrix(size, x.device)).flatten(-2)


@functools.cache
def _hadamard_matrix(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's [size, size] of 1 and -1."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [Q, H, D], the last of the C tokens of k and v [C, Hkv, D]."""
    num_queries, num_heads, dim = q.shape
    context, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    # heads of a group share one K and V: expanded with stride 0, never copied
    queries = q.view(num_queries, num_kv_heads, group, dim).permute(1, 2, 0, 3)
    keys = k.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)
    values = v.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)
    mask = None
    if num_queries > 1:
        last = torch.arange(context - num_queries, context, device=q.device)
        mask = torch.arange(context, device=q.device) <= last[:, None]
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, dim)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    first_query: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Full attention inside each packed segment; [Q, H, D] of q's dtype, in `out` where one is given.

    k and v are [P, H, D], q is the part [Q, H, D] of the P rows that begins at `first_query`; all may be strided views.
    Segment n owns rows `starts[n] .. starts[n + 1]` (int32 [N + 1], from 0 to P). With all queries at once, segments of
    equal length are computed together.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if len(q) < len(k):
        return _part_of_attention(q, k, v, starts, scale, first_query, out)
    lengths = starts.diff()
    for length in sorted(set(lengths.tolist())):
        first = starts[:-1][lengths == length].long()
        rows = (first[:, None] + torch.arange(length, device=q.device)).flatten()
        shape = (len(first), length, *q.shape[1:])
        queries, keys, values = (x[rows].view(shape).transpose(1, 2) for x in (q, k, v))
        result = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        out[rows] = result.transpose(1, 2).flatten(0, 1)
    return out


def _part_of_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    first_query: int,
    out: torch.Tensor,
) -> torch.Tensor:
    bounds = starts.tolist()
    for start, stop in pairwise(bounds):
        rows = slice(max(start - first_query, 0), max(min(stop - first_query, len(q)), 0))
        if rows.start < rows.stop:
            queries, keys, values = (x.transpose(0, 1) for x in (q[rows], k[start:stop], v[start:stop]))
            out[rows] = F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(0, 1)
    return out
