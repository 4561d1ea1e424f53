"""Norms and activations against the references of `layers/`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import rows
from dashinfer_vlm.layers import activation, norm
from dashinfer_vlm.layers.embed import embed
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error

SHAPES = [(1, 8), (5, 1536), (3, 33), (2, 3584)]


def strided(num_rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a wider tensor, whose other numbers are NaN."""
    wide = torch.full((num_rows, size + 7), torch.nan).to(DEVICE, dtype)
    wide[:, :size] = 3 * torch.randn(num_rows, size) + 1
    return wide[:, :size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [33, 128])
def test_a_step_begins_with_words_and_staged_pictures(size: int, dtype: torch.dtype) -> None:
    """What is not looked at is NaN."""
    table = torch.randn(7, size).to(DEVICE, torch.bfloat16)
    table[0] = torch.nan
    ids = torch.tensor([3, 0, 6, 0, 1], device=DEVICE)
    is_item = torch.tensor([False, True, False, True, False], device=DEVICE)
    staged = torch.full((5, size + 4), torch.nan, dtype=dtype, device=DEVICE)
    staged[is_item] = torch.randn(2, size + 4).to(DEVICE, dtype)
    want = embed(ids, table, dtype, staged, is_item)
    assert torch.equal(rows.embed(ids, table, dtype, staged, is_item), want)
    words = ids[~is_item]
    assert torch.equal(rows.embed(words, table, dtype), embed(words, table, dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_norms(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = strided(num_rows, size, dtype)
    weight, bias = (torch.randn(size).to(DEVICE, dtype) for _ in range(2))
    got = rows.rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    assert error(got, norm.rms_norm(x.double(), weight.double(), 1e-6)) < allowed(dtype)
    got = rows.layer_norm(x, weight, bias, 1e-6)
    assert got.dtype == dtype
    assert error(got, norm.layer_norm(x.double(), weight.double(), bias.double(), 1e-6)) < allowed(dtype)
    rows.layer_norm(x, weight, bias, 1e-6, out=x)
    assert torch.equal(x, got)


@pytest.mark.parametrize("dtype", TYPES)
def test_norms_of_rows_that_lack_something(dtype: torch.dtype) -> None:
    x = strided(5, 2050, dtype)
    weight, bias = (torch.randn(2050).to(DEVICE, dtype) for _ in range(2))
    shift = 3 * torch.randn(2050, device=DEVICE)
    whole = x.double() + shift
    got = rows.rms_norm(x, weight, 1e-6, shift=shift)
    assert error(got, norm.rms_norm(whole, weight.double(), 1e-6)) < allowed(dtype)
    assert error(norm.rms_norm(x, weight, 1e-6, shift=shift), got) < allowed(dtype)
    got = rows.layer_norm(x, weight, bias, 1e-6, shift=shift)
    assert error(got, norm.layer_norm(whole, weight.double(), bias.double(), 1e-6)) < allowed(dtype)
    assert error(norm.layer_norm(x, weight, bias, 1e-6, shift=shift), got) < allowed(dtype)
    with pytest.raises(ValueError, match="float32"):
        rows.rms_norm(x, weight, 1e-6, shift=shift.double())


# the interpreter cuts bfloat16 off where a card rounds
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_a_norm_rounds_where_the_reference_does(dtype: torch.dtype) -> None:
    x, weight = strided(7, 384, dtype), torch.randn(384).to(DEVICE, dtype)
    got, want = rows.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6)
    assert (got != want).float().mean() < 0.01  # sums in another order may tip a rounding


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 8), (5, 2050), (3, 34)])
def test_activations(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = strided(num_rows, size, dtype)
    assert error(rows.silu_mul(x), activation.silu_mul(x.double())) < allowed(dtype)
    want = activation.quick_gelu(x.double())
    got = rows.quick_gelu(x)
    assert got.data_ptr() == x.data_ptr()
    assert error(got, want) < allowed(dtype)


def test_large_numbers_neither_overflow_nor_vanish() -> None:
    x = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 3.0, 5.0, 7.0, 9.0]], device=DEVICE)
    torch.testing.assert_close(rows.silu_mul(x), activation.silu_mul(x))
    torch.testing.assert_close(rows.quick_gelu(x.clone()), activation.quick_gelu(x))


def test_no_rows_at_all() -> None:
    x = torch.zeros(0, 8, device=DEVICE)
    assert rows.rms_norm(x, torch.ones(8, device=DEVICE), 1e-6).shape == (0, 8)
    assert rows.silu_mul(x).shape == (0, 4)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"as long as the rows; found torch.float32 \[3, 8\], torch.float32 \[7\]"):
        rows.rms_norm(x, torch.ones(7, device=DEVICE), 1e-6)
    with pytest.raises(ValueError, match="rows must be dense"):
        rows.silu_mul(x.t())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_rows", "heads", "dim"), [(1, 16, 256), (5, 3, 40)])
def test_gates_of_heads_that_stand_between_others(num_rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    x, gates = (torch.randn(num_rows, 2 * heads, dim).to(DEVICE, dtype)[:, i::2] for i in range(2))
    between = x._base[:, 1::2].clone()  # type: ignore[index]
    want = activation.sigmoid_mul(x.double(), gates.double())
    assert rows.sigmoid_mul(x, gates) is x
    assert error(x, want) < allowed(dtype)
    assert torch.equal(x._base[:, 1::2], between)  # type: ignore[index]
