"""Attention over the paged cache against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import paged, splits
from dashinfer_vlm.kernels.cuda.launch import launch
from dashinfer_vlm.kernels.cuda.paged import paged_attention
from dashinfer_vlm.kernels.cuda.splits import num_splits
from dashinfer_vlm.layers import attention
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error


@dataclass(frozen=True, slots=True)
class Batch:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: Tensor
    contexts: Tensor

    def run(self, splits: int | None = None) -> Tensor:
        return paged_attention(self.q, self.k_cache, self.v_cache, self.tables, self.starts, self.contexts, 0.3, splits)

    def expected(self) -> Tensor:
        is_int8 = self.k_cache.dtype == torch.int8
        keys, values = (x if is_int8 else x.double() for x in (self.k_cache, self.v_cache))
        return attention.paged_attention(self.q.double(), keys, values, self.tables, self.starts, self.contexts, 0.3)


def make(
    rows: list[int],
    contexts: list[int],
    heads: tuple[int, int] = (6, 2),
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    block_size: int = 16,
) -> Batch:
    """Blocks of all sequences are shuffled; what no context covers is NaN, q is a strided view."""
    needed = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(needed) + 2).int()
    tables = torch.zeros(len(contexts), max(needed) + 1, dtype=torch.int32)
    for table, begin, count in zip(tables, [0, *accumulate(needed)], needed, strict=False):
        table[:count] = order[begin : begin + count]
    cache = cache or dtype
    shape = (len(order), block_size, heads[1], attention.cache_row_size(dim, cache, "cuda"))
    caches = [torch.full(shape, 99 if cache == torch.int8 else torch.nan, dtype=cache) for _ in range(2)]
    for table, context in zip(tables, contexts, strict=True):
        slots = (table.long()[:, None] * block_size + torch.arange(block_size)).flatten()[:context]
        k, v = torch.randn(2, context, heads[1], dim)
        attention.write_kv(k, v, caches[0], caches[1], slots)
    q = torch.randn(sum(rows), heads[0] + 1, dim).to(dtype)[:, 1:]
    starts = torch.tensor([0, *accumulate(rows)], dtype=torch.int32)
    found = (q, *caches, tables, starts, torch.tensor(contexts, dtype=torch.int32))
    return Batch(*(x.to(DEVICE) for x in found))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("splits", [1, 4])
def test_a_step_of_all_kinds_of_sequences(dtype: torch.dtype, splits: int) -> None:
    batch = make([1, 37, 3, 1, 8, 9], [70, 37, 50, 1, 8, 41], dtype=dtype)
    assert error(batch.run(splits), batch.expected()) < allowed(dtype)


@pytest.mark.parametrize(("heads", "dim"), [((7, 1), 128), ((12, 2), 64), ((3, 1), 64), ((4, 4), 80), ((20, 1), 16)])
def test_groups_and_head_dims_of_every_family(heads: tuple[int, int], dim: int) -> None:
    batch = make([2, 19], [33, 70], heads, dim)
    assert error(batch.run(2), batch.expected()) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("splits", [1, 2])
def test_decode_alone_is_one_launch(dtype: torch.dtype, splits: int) -> None:
    batch = make([1, 1, 1], [1, 65, 130], dtype=dtype)
    assert error(batch.run(splits), batch.expected()) < allowed(dtype)


@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("rows", [[1, 1], [2, 20]])
def test_an_int8_cache(dim: int, rows: list[int]) -> None:
    batch = make(rows, [33, 40], dim=dim, cache=torch.int8)
    assert error(batch.run(2), batch.expected()) < 1e-5


def test_a_cache_narrower_than_the_queries() -> None:
    batch = make([1, 20], [33, 40], cache=torch.bfloat16)
    assert error(batch.run(2), batch.expected()) < 1e-5


def test_rows_that_nobody_owns_are_neither_read_nor_written() -> None:
    batch = make([1, 12, 3], [20, 30, 40])
    want = batch.expected()
    q = torch.full((24, *batch.q.shape[1:]), torch.nan, device=DEVICE)
    q[:16] = batch.q
    starts = torch.cat((batch.starts, batch.starts[-1:].expand(5)))
    contexts = torch.cat((batch.contexts, batch.contexts.new_zeros(5)))
    tables = torch.cat((batch.tables, batch.tables.new_zeros(5, batch.tables.shape[1])))
    got = Batch(q, batch.k_cache, batch.v_cache, tables, starts, contexts).run(2)
    assert error(got[:16], want) < 1e-5
    assert got[16:].isnan().all()


def test_a_padded_step_of_decode() -> None:
    batch = make([1, 1, 1], [20, 30, 40])
    want = batch.expected()
    q = torch.cat((batch.q, torch.full((5, *batch.q.shape[1:]), torch.nan, device=DEVICE)))
    starts = torch.cat((batch.starts, batch.starts[-1:].expand(5)))
    contexts = torch.cat((batch.contexts, batch.contexts.new_zeros(5)))
    tables = torch.cat((batch.tables, batch.tables.new_zeros(5, batch.tables.shape[1])))
    got = Batch(q, batch.k_cache, batch.v_cache, tables, starts, contexts).run()
    assert error(got[:3], want) < 1e-5
    assert got[3:].isnan().all()


def test_scores_that_are_all_far_below_zero() -> None:
    batch = make([1, 12], [40, 40])
    batch.q.mul_(1e4)
    assert error(batch.run(4), batch.expected()) < 1e-4


@pytest.mark.parametrize("splits", [1, 4])
def test_more_sequences_than_are_looked_at_at_a_time(splits: int) -> None:
    batch = make([1, 9, *[0] * 130, 11, 2, 1], [20, 30, *[0] * 130, 40, 50, 1], heads=(3, 1))
    assert error(batch.run(splits), batch.expected()) < 1e-5


@pytest.mark.parametrize("cache", [torch.float32, torch.int8])
def test_splits_that_no_keys_are_left_for(cache: torch.dtype) -> None:
    """Neither programs nor what joins them look at what such a split would have found."""
    batch = make([1, 37, 3], [1, 40, 3], (3, 1), cache=cache)
    assert error(batch.run(8), batch.expected()) < 1e-5
    batch = make([1, 1], [1, 33], (3, 1), cache=cache)
    assert error(batch.run(8), batch.expected()) < 1e-5


def test_a_chunk_of_a_prompt_is_shared_by_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of it would leave most of a card idle."""
    batch, launched = make([1, 20], [40, 200]), []

    def counted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launched.append(grid)
        launch(kernel, grid, *arguments, **options)

    for module in (paged, splits):
        monkeypatch.setattr(module, "launch", counted)
    assert error(batch.run(), batch.expected()) < 1e-5
    few, many, combined = launched
    assert few[2] == many[2] == 4
    assert combined == (21, 6)


def test_splits_fill_a_card_and_no_more() -> None:
    assert num_splits(384, 4, 1 << 20, 64) == 64
    assert num_splits(384, 128 * 4, 1024, 64) == 1
    assert num_splits(384, 64 * 2, 1024, 64) == 2
    assert num_splits(384, 8 * 4, 1024, 64) == 8
    assert num_splits(384, 4, 64, 64) == 1


@pytest.mark.parametrize("num_rows", [64, 128, 256, 512, 1024, 2048])
def test_what_splits_find_takes_no_more_memory_in_long_steps(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = (torch.zeros(*size, device="meta") for size in ((num_rows, 28, 128), (9, 16, 4, 128)))
    tables, starts, contexts = (torch.zeros(*size, device="meta").int() for size in ((129, 999), (130,), (129,)))
    taken, empty = [], torch.empty

    def measured(*size: Any, **options: Any) -> Tensor:
        taken.append(empty(*size, **options))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", measured)
    for module in (paged, splits):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    monkeypatch.setattr(paged, "MANY_PROGRAMS", 264)
    out = paged_attention(q, keys, keys, tables, starts, contexts, 0.3)
    assert sum(x.nbytes for x in taken) - out.nbytes <= 264 * 64 * (128 + 1) * 4


def test_what_does_not_fit_is_refused() -> None:
    batch = make([1], [5])
    with pytest.raises(ValueError, match=r"query_starts must be \[S \+ 1\]; found torch.int32 \[3\]"):
        Batch(batch.q, batch.k_cache, batch.v_cache, batch.tables, torch.zeros(3).int(), batch.contexts).run()
