"""Decode in one launch against rotation, write and attention one after the other, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda.arrivals import arrived_of
from dashinfer_vlm.kernels.cuda.decode import MOST_SHARED, rope_and_attend
from dashinfer_vlm.kernels.head_norms import HeadNorms
from dashinfer_vlm.layers import attention
from dashinfer_vlm.layers.ops import REFERENCE
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of joined queries, keys and values, and a cache of which only the past is filled; the rest is NaN."""

    joined: Tensor
    heads: tuple[int, int]
    tables: tuple[Tensor, Tensor]
    caches: tuple[Tensor, Tensor]
    slots: Tensor
    block_tables: Tensor
    starts: Tensor
    contexts: Tensor
    norms: HeadNorms | None = None

    def run(self, splits: int | None = None) -> Tensor:
        return self._call(rope_and_attend, self.joined, self.caches, splits)

    def expected(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The result, and the caches afterwards."""
        keys, values = (cache.double() for cache in self.caches)
        return self._call(REFERENCE.attend, self.joined.double(), (keys, values)), (keys, values)

    def _call(
        self, function: Callable[..., Tensor], joined: Tensor, caches: tuple[Tensor, Tensor], *more: int | None
    ) -> Tensor:
        queries, keys = self.heads
        q, k, v = torch.split(joined.clone(), [queries, keys, keys], dim=1)
        told = (*self.tables, *caches, self.slots, self.block_tables, self.starts, self.contexts, 0.3, self.norms)
        return function(q, k, v, *told, *more)


def make(
    contexts: list[int],
    heads: tuple[int, int] = (6, 2),
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    rows: list[int] | None = None,
    turned: int | None = None,
) -> Step:
    """One row of each sequence where `rows` says nothing else, all channels turned where `turned` does not."""
    rows = rows or [1] * len(contexts)
    needed = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(needed) + 2).int()
    block_tables = torch.zeros(len(contexts), max(needed) + 1, dtype=torch.int32)
    for table, begin, count in zip(block_tables, [0, *accumulate(needed)], needed, strict=False):
        table[:count] = order[begin : begin + count]
    cache = cache or dtype
    shape = (len(order), BLOCK_SIZE, heads[1], attention.cache_row_size(dim, cache, "cuda"))
    caches = [torch.full(shape, 99 if cache == torch.int8 else torch.nan, dtype=cache) for _ in range(2)]
    newest = []
    for table, context, count in zip(block_tables, contexts, rows, strict=True):
        slots = (table.long()[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:context]
        newest.append(slots[context - count :])
        k, v = torch.randn(2, context - count, heads[1], dim)
        attention.write_kv(k, v, caches[0], caches[1], slots[: context - count])
    joined = torch.randn(sum(rows), heads[0] + 2 * heads[1], dim).to(dtype)
    angles = 100 * torch.rand(sum(rows), (turned or dim) // 2)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, *accumulate(rows)], contexts))
    found = (joined, angles.cos(), angles.sin(), *caches, torch.cat(newest), block_tables, starts, lengths)
    joined, cos, sin, keys, values, slots, block_tables, starts, lengths = (x.to(DEVICE) for x in found)
    return Step(joined, heads, (cos, sin), (keys, values), slots, block_tables, starts, lengths)


def assert_right(step: Step, splits: int | None, tolerance: float) -> None:
    want, caches = step.expected()
    assert error(step.run(splits), want) < tolerance
    for got, wanted in zip(step.caches, caches, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert error(got.nan_to_num(), wanted.nan_to_num()) < tolerance


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("splits", [1, 4, None])
def test_one_row_of_each_sequence(dtype: torch.dtype, splits: int | None) -> None:
    assert_right(make([1, 2, 16, 17, 65, 130], dtype=dtype), splits, allowed(dtype))


@pytest.mark.parametrize(("heads", "dim"), [((7, 1), 128), ((12, 2), 64), ((4, 4), 32), ((20, 1), 32)])
def test_groups_and_head_dims(heads: tuple[int, int], dim: int) -> None:
    assert_right(make([33, 70], heads, dim), 2, 1e-5)


def test_a_cache_narrower_than_the_rows() -> None:
    assert_right(make([20, 33], cache=torch.bfloat16), 2, 1e-2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [None, [1, 12]], ids=["decode", "a prompt"])
def test_heads_are_normed_before_they_are_rotated(dtype: torch.dtype, rows: list[int] | None) -> None:
    step = make([33, 70], dtype=dtype, rows=rows)
    of_q, of_k = (1 + torch.rand(2, 32, device=DEVICE)).to(dtype)
    # the interpreter cuts off where a card rounds, twice more in a norm
    assert_right(replace(step, norms=HeadNorms(of_q, of_k, 1e-6)), 2, 2 * allowed(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [None, [1, 12]], ids=["decode", "a prompt"])
@pytest.mark.parametrize(("dim", "turned"), [(256, 64), (64, 48)])
def test_heads_turned_in_part(dtype: torch.dtype, rows: list[int] | None, dim: int, turned: int) -> None:
    """Normed, as Qwen3.5 has them, and as they are."""
    step = make([33, 70], (4, 1), dim, dtype, rows=rows, turned=turned)
    assert_right(step, 2, allowed(dtype))
    step = make([33, 70], (4, 1), dim, dtype, rows=rows, turned=turned)
    of_q, of_k = (1 + torch.rand(2, dim, device=DEVICE)).to(dtype)
    assert_right(replace(step, norms=HeadNorms(of_q, of_k, 1e-6)), 2, 2 * allowed(dtype))


def test_a_row_by_itself() -> None:
    assert_right(make([200], dim=128), 16, 1e-5)


def test_what_programs_share_is_joined_alike_each_time() -> None:
    """Sequences of which all programs, some and one have a part; nothing is left behind for the next layer or step."""
    step = make([1, 40, 130, 70])
    first = step.run(4)
    assert torch.equal(step.run(4), first)
    assert not arrived_of(step.caches[0], MOST_SHARED).any()
    step.contexts.clamp_(max=60)
    assert torch.equal(step.run(2), step.run(2))


def test_more_rows_than_can_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="1024 pairs"):
        make([1] * 257, heads=(4, 4)).run(2)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_nobody_owns_are_neither_read_nor_written(splits: int) -> None:
    step = make([20, 30, 40])
    want, (keys, _) = step.expected()
    padded = Step(
        torch.cat((step.joined, torch.full((5, *step.joined.shape[1:]), torch.nan, device=DEVICE))),
        step.heads,
        tuple(torch.cat((x, x.new_zeros(5, x.shape[1]))) for x in step.tables),  # type: ignore[arg-type]
        step.caches,
        torch.cat((step.slots, step.slots.new_full((5,), 1 << 40))),
        torch.cat((step.block_tables, step.block_tables.new_zeros(5, step.block_tables.shape[1]))),
        torch.cat((step.starts, step.starts[-1:].expand(5))),
        torch.cat((step.contexts, step.contexts.new_zeros(5))),
    )
    got = padded.run(splits)
    assert error(got[:3], want) < 1e-5
    assert got[3:].isnan().all()
    assert torch.equal(step.caches[0].isnan(), keys.isnan())


@pytest.mark.parametrize(
    ("contexts", "rows", "dim", "turned", "cache"),
    [
        ([40, 30], [1, 12], 32, None, None),
        ([40, 30], [1, 12], 32, 8, None),
        ([20, 33], None, 80, None, None),
        ([20, 33], None, 32, None, torch.int8),
        ([20, 33], None, 256, 64, torch.int8),
    ],
    ids=["a prompt", "a prompt turned in part", "80 channels", "int8", "int8 turned in part"],
)
def test_what_is_none_of_these_is_two_launches(
    contexts: list[int], rows: list[int] | None, dim: int, turned: int | None, cache: torch.dtype | None
) -> None:
    step = make(contexts, dim=dim, cache=cache, rows=rows, turned=turned)
    if cache is None:
        assert_right(step, 2, 1e-5)
        return
    want = step._call(REFERENCE.attend, step.joined, tuple(x.clone() for x in step.caches))  # type: ignore[arg-type]
    assert error(step.run(2), want) < 2e-3
