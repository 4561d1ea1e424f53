"""The plain-torch attention against the definition, on odd sizes and views."""

from __future__ import annotations

import pytest
import torch

from dashinfer_vlm.layers.attention import cache_row_size, paged_attention, varlen_attention, write_kv
from tests.kernels.eight_bit import numbers, seen_by_keys, transformed


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> torch.Tensor:
    """The definition, in float64: q [Q, H, D] are the last of the C tokens of k and v [C, Hkv, D]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,chd->hqc", q.double(), k) * scale
    if causal:
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(future, -torch.inf)
    return torch.einsum("hqc,chd->qhd", scores.softmax(-1), v).float()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("block_size", "dim"), [(1, 10), (5, 24), (16, 16)])
def test_paged_attention_is_causal_attention_over_scattered_blocks(
    block_size: int, dim: int, cache_dtype: torch.dtype
) -> None:
    torch.manual_seed(block_size)
    heads, kv_heads, scale = 6, 2, 0.3
    queries, contexts = [1, 7, 1, 12], [33, 7, 1, 30]
    num_blocks = [-(-context // block_size) for context in contexts]
    cache_shape = (sum(num_blocks) + 3, block_size, kv_heads, cache_row_size(dim, cache_dtype))
    k_cache = torch.full(cache_shape, -1 if cache_dtype == torch.int8 else torch.nan, dtype=cache_dtype)  # bytes of NaN
    v_cache = k_cache.clone()
    free = torch.randperm(len(k_cache)).tolist()
    table = torch.zeros(4, max(num_blocks), dtype=torch.int32)
    qkv = torch.randn(sum(queries), heads + 3, dim)
    q = qkv[:, :heads]
    stored = []
    for s, context in enumerate(contexts):
        blocks = torch.tensor([free.pop() for _ in range(num_blocks[s])])
        table[s, : len(blocks)] = blocks
        slots = torch.tensor([int(blocks[i // block_size]) * block_size + i % block_size for i in range(context)])
        k, v = torch.randn(2, context, kv_heads, dim)
        write_kv(k, v, k_cache, v_cache, slots)
        stored.append(tuple(numbers(cache.flatten(0, 1)[slots]) for cache in (k_cache, v_cache)))
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    out = paged_attention(q, k_cache, v_cache, table, starts, torch.tensor(contexts, dtype=torch.int32), scale)
    for s, (k, v) in enumerate(stored):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        expected = attention(seen_by_keys(q[rows], k_cache), k, v, scale, causal=True)
        torch.testing.assert_close(out[rows], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [128, 80, 20])
def test_an_int8_row_is_within_half_a_step_of_what_was_written(dim: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 30, 2, dim)
    k_cache, v_cache = torch.zeros(2, 4, 8, 2, cache_row_size(dim, torch.int8), dtype=torch.int8)
    slots = torch.randperm(32)[:30]
    write_kv(k, v, k_cache, v_cache, slots)
    for written, cache in ((transformed(k), k_cache), (v.double(), v_cache)):
        half_step = written.abs().amax(-1, keepdim=True) / 254
        assert ((numbers(cache.flatten(0, 1)[slots]) - written).abs() <= half_step * (1 + 1e-5)).all()


def test_a_part_of_the_queries_gives_its_rows_of_the_whole() -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, 4, 13, 14, 78, 91]).int()
    q, k, v = torch.randn(91, 9, 12).split(3, dim=1)  # type: ignore[no-untyped-call]
    whole = varlen_attention(q, k, v, starts, 0.25)
    for part in (slice(0, 3), slice(12, 20), slice(20, 91), slice(91, 91)):
        rows = varlen_attention(q[part], k, v, starts, 0.25, part.start)
        torch.testing.assert_close(rows, whole[part], atol=1e-5, rtol=1e-5)


def test_varlen_attention_keeps_segments_apart() -> None:
    torch.manual_seed(0)
    lengths = [4, 9, 1, 4, 64, 9]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = torch.randn(sum(lengths), 9, 12).split(3, dim=1)  # type: ignore[no-untyped-call]
    out = varlen_attention(q, k, v, starts, 0.25)
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        piece = slice(first, last)
        expected = attention(q[piece], k[piece], v[piece], 0.25, causal=False)
        torch.testing.assert_close(out[piece], expected, atol=1e-5, rtol=1e-5)
