"""Paged and packed attention against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops
from tests.kernels.eight_bit import numbers, seen_by_keys

pytestmark = pytest.mark.usefixtures("level")


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of given query counts and contexts, their tokens in shuffled blocks of one cache."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    scale: float

    def run(self, **changes: Any) -> Tensor:
        names = ("q", "k_cache", "v_cache", "block_tables", "query_starts", "context_lens", "scale")
        return cpu_ops.paged_attention(*(changes.get(name, getattr(self, name)) for name in names))


def make_batch(
    queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> Batch:
    needed = [-(-n // block_size) for n in contexts]
    num_blocks = sum(needed) + 3
    order, tables = torch.randperm(num_blocks).int(), torch.full((len(contexts), max(needed)), -1, dtype=torch.int32)
    for s, n in enumerate(needed):
        tables[s, :n] = order[sum(needed[:s]) : sum(needed[: s + 1])]
    cache = random_cache((2, num_blocks, block_size, kv_heads, dim), dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), heads + 1, dim)[:, 1:]
    return Batch(q, cache[0], cache[1], tables, starts, torch.tensor(contexts).int(), dim**-0.5)


def random_cache(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype != torch.int8:
        return torch.randn(shape).to(dtype)
    scales = torch.rand(*shape[:-1], 1) / 50
    return torch.cat((torch.randint(-127, 128, shape, dtype=torch.int8), scales.view(torch.int8)), dim=-1)


def expected(batch: Batch) -> Tensor:
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    block_size, group = batch.k_cache.shape[1], batch.q.shape[1] // batch.k_cache.shape[2]
    starts, q = batch.query_starts.tolist(), seen_by_keys(batch.q, batch.k_cache)
    for s, context in enumerate(batch.context_lens.tolist()):
        first, last = starts[s], starts[s + 1]
        blocks = batch.block_tables[s, : -(-context // block_size)].long()
        k, v = (numbers(c[blocks].flatten(0, 1)[:context]) for c in (batch.k_cache, batch.v_cache))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k) * batch.scale
        positions = context - (last - first) + torch.arange(last - first)
        scores.masked_fill_(torch.arange(context) > positions[:, None], -torch.inf)
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def assert_loses_what_rounding_loses(got: Tensor, want: Tensor) -> None:
    """torch's own attention in bfloat16 loses 3.5e-3 to 4.5e-3 of the norm on the shapes of these tests."""
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    assert (got - want).norm() <= 4.5e-3 * want.norm()


def assert_right(batch: Batch) -> None:
    if cpu_ops.multiplies_bfloat16() and batch.k_cache.dtype == torch.bfloat16:
        assert_loses_what_rounding_loses(batch.run(), expected(batch))
    else:
        assert_close(batch.run(), expected(batch))


SHAPES = [
    (12, 2, 128, 16),
    (4, 2, 16, 8),
    (3, 3, 20, 4),
    (7, 1, 80, 32),
    (8, 1, 64, 16),
    (6, 1, 13, 16),
    (2, 2, 256, 1),
]


DTYPES = [torch.bfloat16, torch.float32, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), SHAPES)
def test_a_mixed_batch_attends_to_its_own_context(
    heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> None:
    queries, contexts = [1, 40, 1, 0, 3, 33, 1, 1], [1, 300, 700, 5, 30, 33, 128, 129]
    assert_right(make_batch(queries, contexts, heads, kv_heads, dim, block_size, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_long_context_is_cut_between_threads_without_a_trace(num_threads: int, dtype: torch.dtype) -> None:
    assert_right(make_batch([1, 2], [3000, 2000], 6, 1, 64, 16, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_prefill_in_chunks_is_prefill_at_once(dtype: torch.dtype) -> None:
    whole = make_batch([90], [90], 4, 2, 32, 16, dtype)
    got = whole.run()
    for first, last in [(0, 7), (7, 50), (50, 51), (51, 90)]:
        starts, contexts = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        chunk = whole.run(q=whole.q[first:last], query_starts=starts, context_lens=contexts)
        torch.testing.assert_close(chunk, got[first:last], rtol=0, atol=2e-6)


def test_huge_scores_do_not_overflow() -> None:
    batch = make_batch([1, 20], [300, 300], 4, 2, 16, 16, torch.float32)
    big = batch.q * 1e4
    want = expected(Batch(big, *(getattr(batch, n) for n in list(Batch.__dataclass_fields__)[1:])))
    torch.testing.assert_close(batch.run(q=big).double(), want, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cache_may_be_a_slice_of_a_larger_one(dtype: torch.dtype) -> None:
    batch = make_batch([1, 9], [40, 50], 4, 2, 16, 8, dtype)
    wide = random_cache((batch.k_cache.shape[0], 3, 8, 2, 16), dtype)
    wide[:, 0], wide[:, 2] = batch.k_cache, batch.v_cache
    assert torch.equal(batch.run(k_cache=wide[:, 0], v_cache=wide[:, 2]), batch.run())


def test_paged_attention_names_what_is_wrong() -> None:
    batch = make_batch([1, 4], [10, 20], 4, 2, 16, 8, torch.bfloat16)
    block_of_nobody = batch.block_tables.clone()
    block_of_nobody[1, 2] = batch.k_cache.shape[0]
    eight_bit = torch.zeros(batch.k_cache.shape, dtype=torch.int8)
    cases: list[tuple[str, dict[str, Tensor]]] = [
        ("q: expected float32", {"q": batch.q.bfloat16()}),
        ("q: expected a multiple of 2 heads", {"q": batch.q[:, :3]}),
        ("q: expected shape", {"q": batch.q[:, :, :8]}),
        ("v_cache: expected bfloat16", {"v_cache": eight_bit}),
        (r"q: expected shape \[5, 4, 12\]", {"k_cache": eight_bit, "v_cache": eight_bit}),
        (
            "k_cache: expected a head_dim from 1 to 256, and 4 bytes more in int8",
            {"k_cache": eight_bit[..., :4], "v_cache": eight_bit[..., :4]},
        ),
        ("v_cache: expected bfloat16", {"v_cache": batch.v_cache.float()}),
        ("v_cache: expected shape", {"v_cache": batch.v_cache[1:]}),
        ("block_tables: expected int32", {"block_tables": batch.block_tables.long()}),
        ("block_tables: sequence 1: block .* is not one of", {"block_tables": block_of_nobody}),
        ("block_tables: sequence 1: 3 blocks needed", {"block_tables": batch.block_tables[:, :2]}),
        ("context_lens: sequence 1: 4 queries", {"context_lens": torch.tensor([10, 3]).int()}),
        ("query_starts: must not fall", {"query_starts": torch.tensor([0, 6, 5]).int()}),
        ("query_starts: must go from 0 to 5", {"query_starts": torch.tensor([0, 1, 4]).int()}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            batch.run(**changes)


def packed_expected(q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for first, last in itertools.pairwise(starts):
        scores = torch.einsum("qhd,khd->hqk", q[first:last].double(), k[first:last].double()) * scale
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first:last].double())
    return out


@pytest.mark.parametrize("starts", [[0, 4, 68, 68, 69, 300], [0, 97], [0, *range(1, 40)], [0]])
@pytest.mark.parametrize(("heads", "dim"), [(16, 80), (2, 64), (3, 13), (1, 256)])
def test_packed_segments_attend_to_themselves(heads: int, dim: int, starts: list[int]) -> None:
    q, k, v = torch.randn(starts[-1], 3, heads, dim).unbind(1)
    got = cpu_ops.varlen_attention(q, k, v, torch.tensor(starts).int(), dim**-0.5)
    assert_close(got, packed_expected(q, k, v, starts, dim**-0.5))


@pytest.mark.parametrize("starts", [[0, 4, 68, 68, 69, 300], [0, 97], [0, *range(1, 40)], [0], [0, 1030]])
@pytest.mark.parametrize(("heads", "dim"), [(16, 80), (2, 64), (3, 13), (1, 256), (2, 36)])
def test_packed_segments_in_bfloat16_lose_what_rounding_loses(heads: int, dim: int, starts: list[int]) -> None:
    q, k, v = torch.randn(starts[-1], 3, heads, dim).unbind(1)
    got = cpu_ops.varlen_attention(q, k, v, torch.tensor(starts).int(), dim**-0.5, bfloat16=True)
    want = packed_expected(q, k, v, starts, dim**-0.5)
    if cpu_ops.multiplies_bfloat16():
        assert_loses_what_rounding_loses(got, want)
    else:
        assert_close(got, want)


def test_huge_scores_in_bfloat16_do_not_overflow() -> None:
    q, k, v = torch.randn(3, 200, 2, 64)
    got = cpu_ops.varlen_attention(1e4 * q, k, v, torch.tensor([0, 150, 200]).int(), 1.0, bfloat16=True)
    assert got.isfinite().all()
    assert (got.abs() <= v.abs().max() * 1.01).all()


@pytest.mark.parametrize("queries", [(0, 0), (0, 300), (3, 5), (67, 70), (69, 300), (120, 251), (300, 300)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_part_of_the_queries_gives_its_rows_of_the_whole(queries: tuple[int, int], bfloat16: bool) -> None:
    starts, part = [0, 4, 68, 68, 69, 300], slice(*queries)
    q, k, v = torch.randn(starts[-1], 3, 5, 40).unbind(1)
    got = cpu_ops.varlen_attention(q[part], k, v, torch.tensor(starts).int(), 0.2, part.start, bfloat16=bfloat16)
    want = packed_expected(q, k, v, starts, 0.2)[part]
    if bfloat16 and cpu_ops.multiplies_bfloat16():
        assert_loses_what_rounding_loses(got, want)
    else:
        assert_close(got, want)


def test_packed_attention_gives_the_same_bits_with_any_number_of_threads(num_threads: int) -> None:
    q, k, v = torch.randn(3, 400, 4, 80)
    starts = torch.tensor([0, 100, 350, 400]).int()
    got = cpu_ops.varlen_attention(q, k, v, starts, 0.1)
    cpu_ops.set_num_threads(1)
    assert torch.equal(got, cpu_ops.varlen_attention(q, k, v, starts, 0.1)), num_threads


def test_packed_attention_names_what_is_wrong() -> None:
    q, starts = torch.randn(10, 2, 16), torch.tensor([0, 10]).int()
    wide = torch.zeros(10, 1, 257)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("v: expected shape", lambda: cpu_ops.varlen_attention(q[:9], q, q[:9], starts, 1.0)),
        (
            "q: expected at most 10 positions with first_query, which is 4",
            lambda: cpu_ops.varlen_attention(q[:7], q, q, starts, 1.0, 4),
        ),
        ("q: expected at most 10 positions", lambda: cpu_ops.varlen_attention(q[:7], q, q, starts, 1.0, -1)),
        ("v: expected float32", lambda: cpu_ops.varlen_attention(q, q, q.bfloat16(), starts, 1.0)),
        ("starts: must go from 0 to 10", lambda: cpu_ops.varlen_attention(q, q, q, starts[:1], 1.0)),
        ("head_dim", lambda: cpu_ops.varlen_attention(wide, wide, wide, starts, 1.0)),
        ("out must not share", lambda: cpu_ops.varlen_attention(q, q.clone(), q.clone(), starts, 1.0, out=q)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
