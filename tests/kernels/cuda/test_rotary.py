"""Rotation and the write into the cache against the references of `layers/`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda.hadamard import hadamard_blocks
from dashinfer_vlm.kernels.cuda.rotary import mrope_cos_sin, rope, rope_write_kv
from dashinfer_vlm.layers import attention, rotary
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error


def tables(num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = 100 * torch.rand(num_rows, dim // 2, device=DEVICE)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "dim"), [(32, 80), (5, 64), (33, 72), (1, 128)])
def test_rotation_in_place_of_some_heads(heads: int, dim: int, dtype: torch.dtype) -> None:
    wide = torch.randn(3, heads + 2, dim).to(DEVICE, dtype)
    x, (cos, sin) = wide[:, :heads], tables(3, dim)
    rest, want = wide[:, heads:].clone(), x.double()
    rotary.rope(want, cos, sin)
    rope(x, cos, sin)
    assert error(x, want) < allowed(dtype)
    assert torch.equal(wide[:, heads:], rest)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
@pytest.mark.parametrize("axes", [[0] * 4 + [1] * 6 + [2] * 6, [0, 1, 2] * 5 + [0], [0] * 20])
def test_tables_of_joined_and_of_interleaved_axes(axes: list[int], kind: torch.dtype) -> None:
    positions = torch.randint(0, 32000, (3, 14)).to(DEVICE, kind)[:, ::2]
    frequencies = rotary.inverse_frequencies(2 * len(axes), 1e6, DEVICE)
    which = torch.tensor(axes, device=DEVICE)
    for got, want in zip(
        mrope_cos_sin(positions, frequencies, which),
        rotary.mrope_cos_sin(positions.double(), frequencies, which),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 128), (7, 1, 32), (33, 3, 80)])
def test_the_cache_gets_the_rows_of_the_reference(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, cache: torch.dtype
) -> None:
    num_rows, (cos, sin) = 5, tables(5, dim)
    qkv = torch.randn(num_rows, heads + 2 * kv_heads, dim).to(DEVICE, dtype)
    qkv[:, heads, :3] *= 50
    slots = torch.tensor([17, 3, 40, 0, 31], device=DEVICE)
    shape = (3, 16, kv_heads, attention.cache_row_size(dim, cache, "cuda"))
    got, want = (torch.full((2, *shape), 55, dtype=cache, device=DEVICE) for _ in range(2))
    (q, k, v), (q2, k2, v2) = (torch.split(qkv.clone(), [heads, kv_heads, kv_heads], dim=1) for _ in range(2))
    rope_write_kv(q, k, v, cos, sin, got[0], got[1], slots)
    attention.rope_write_kv(q2, k2, v2, cos, sin, want[0], want[1], slots)
    assert error(q, q2) < allowed(dtype)
    untouched = torch.ones(48, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    assert (got.flatten(1, 2)[:, untouched] == 55).all()
    if cache != torch.int8:
        assert error(got, want) < max(allowed(dtype), allowed(cache))
        return
    rows = [x.flatten(1, 2)[:, slots] for x in (got, want)]
    assert error(*(attention._numbers(x, dim) for x in rows)) < (2e-2 if dtype == torch.bfloat16 else 2e-3)
    if dtype == torch.float32:
        assert (rows[0] != rows[1]).float().mean() < 0.01  # on the border between two numbers


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [1, 2])
def test_what_is_no_number_stays_none_in_int8(bad: float, part: int) -> None:
    """A key or a value; its row has a scale that is none."""
    rows = torch.randn(3, 2, 1, 64, device=DEVICE)
    rows[part, 1, 0, 3] = bad
    shape = (1, 16, 1, attention.cache_row_size(64, torch.int8, "cuda"))
    caches = [torch.zeros(shape, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    (q, k, v), (keys, values) = rows, caches
    rope_write_kv(q, k, v, *tables(2, 64), keys, values, torch.arange(2, device=DEVICE))
    scales = [cache[0, :2, 0, 64:68].contiguous().view(torch.float32).isfinite().flatten().tolist() for cache in caches]
    assert scales[part - 1] == [True, False]
    assert scales[2 - part] == [True, True]


def test_a_row_of_zeros_stays_one_in_int8() -> None:
    cos, sin = tables(1, 32)
    q, k, v = torch.zeros(3, 1, 1, 32, device=DEVICE)
    caches = torch.full((2, 1, 16, 1, 36), 55, dtype=torch.int8, device=DEVICE)
    rope_write_kv(q, k, v, cos, sin, caches[0], caches[1], torch.tensor([2], device=DEVICE))
    assert not caches[:, 0, 2].any()


@pytest.mark.parametrize("dim", [128, 96, 80, 36])
def test_the_transform_is_that_of_the_reference(dim: int) -> None:
    matrix, size = hadamard_blocks(dim, torch.device("cpu"))
    x = torch.randn(3, dim)
    torch.testing.assert_close(x @ matrix, attention._hadamard(x))
    assert size == attention._hadamard_size(dim)
