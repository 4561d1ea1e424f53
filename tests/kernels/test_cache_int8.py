"""What is written into an int8 cache, and what is lost by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers import attention as reference
from tests.kernels.eight_bit import numbers, transformed

pytestmark = pytest.mark.usefixtures("level")


def zeros(num_blocks: int, block_size: int, heads: int, dim: int) -> Tensor:
    return torch.zeros(num_blocks, block_size, heads, dim + 4, dtype=torch.int8)


def write(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of [T, H, D] tokens, in blocks of 8."""
    caches = zeros(-(-len(k) // 8), 8, *k.shape[1:]), zeros(-(-len(k) // 8), 8, *k.shape[1:])
    cpu_ops.write_kv(k, v, *caches, torch.arange(len(k)))
    return caches[0].flatten(0, 1)[: len(k)], caches[1].flatten(0, 1)[: len(k)]


DIMS = [128, 80, 64, 8, 20, 13, 256]


@pytest.mark.parametrize("dim", DIMS)
def test_a_row_is_within_half_a_step_of_what_was_written(dim: int) -> None:
    k, v = torch.randn(50, 4, dim)[:, 1:3], torch.randn(50, 2, dim) * torch.logspace(-20, 20, 50)[:, None, None]
    for written, rows in zip((transformed(k), v.double()), write(k, v), strict=True):
        half_step = written.abs().amax(-1, keepdim=True) / 254
        assert ((numbers(rows) - written).abs() <= half_step * (1 + 1e-5)).all()


@pytest.mark.parametrize("dim", DIMS)
def test_the_reference_writes_the_same_but_for_ties(dim: int) -> None:
    k, v = torch.randn(2, 40, 3, dim)
    caches = zeros(5, 8, 3, dim), zeros(5, 8, 3, dim)
    reference.write_kv(k, v, *caches, torch.arange(40))
    for ours, theirs in zip(write(k, v), caches, strict=True):
        difference = (ours[..., :-4].int() - theirs.flatten(0, 1)[..., :-4].int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 1e-3


def test_slots_of_other_tokens_stay_as_they_are() -> None:
    wide = torch.full((10, 2, 8, 2, 20), 5, dtype=torch.int8)
    slots = torch.randperm(80)[:50]
    k, v = torch.randn(2, 50, 2, 16)
    cpu_ops.write_kv(k, v, wide[:, 0], wide[:, 1], slots)
    others = torch.ones(80, dtype=torch.bool)
    others[slots] = False
    for cache, rows in zip((wide[:, 0], wide[:, 1]), write(k, v), strict=True):
        flat = cache.reshape(80, 2, 20)
        assert torch.equal(flat[slots], rows)
        assert (flat[others] == 5).all()


@pytest.mark.parametrize("dim", [128, 20])
def test_positions_are_applied_before_the_transform(dim: int) -> None:
    q, k, v = torch.randn(30, 6, dim), torch.randn(30, 2, dim), torch.randn(30, 2, dim)
    angles = torch.rand(30, dim // 2) * math.tau
    cos, sin, slots = angles.cos(), angles.sin(), torch.arange(30)
    caches = zeros(4, 8, 2, dim), zeros(4, 8, 2, dim)
    before = k.clone()
    cpu_ops.rope_write_kv(q, k, v, cos, sin, *caches, slots)
    assert torch.equal(k, before)
    cpu_ops.rope(k, cos, sin)
    for cache, rows in zip(caches, write(k, v), strict=True):
        assert torch.equal(cache.flatten(0, 1)[:30], rows)


def test_rows_of_nothing_stay_nothing_and_what_is_not_finite_stays_so() -> None:
    x = torch.zeros(4, 1, 16)
    x[1], x[2, 0, 3], x[3, 0, 5] = 1e-38, torch.nan, -torch.inf
    for rows in write(x, x):
        got = numbers(rows)
        assert (got[0] == 0).all()
        assert got[1].abs().max() < 1e-30
        assert not got[2].isfinite().any()
        assert not got[3].isfinite().all()


def test_channels_a_hundred_times_larger_than_the_others_cost_little() -> None:
    """Like Qwen2's keys, whose bias does that: without the transform the error here is seven times as large."""
    context, dim = 400, 128
    k, v, q = torch.randn(context, 1, dim), torch.randn(context, 1, dim), torch.randn(1, 6, dim)
    k[..., 60], k[..., 124] = 150.0, -100.0
    k_cache, v_cache = (rows.reshape(50, 8, 1, dim + 4) for rows in write(k, v))
    table, starts = torch.arange(50)[None].int(), torch.tensor([0, 1]).int()
    contexts = torch.tensor([context]).int()
    got = cpu_ops.paged_attention(q, k_cache, v_cache, table, starts, contexts, dim**-0.5)
    weights = (torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) * dim**-0.5).softmax(-1)
    want = torch.einsum("hqk,kd->qhd", weights, v[:, 0].double())
    assert (got - want).norm() / want.norm() < 0.06
