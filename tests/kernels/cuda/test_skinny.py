"""Products of few rows: every layout of weights, and all that can ride in them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as each
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import few_bits, skinny
from dashinfer_vlm.kernels.cuda.skinny import MOST_ROWS, num_splits, product
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue, silu_mul
from dashinfer_vlm.layers.card_backend import grouped_linears
from dashinfer_vlm.layers.cuda import CudaHead, CudaLinear, CudaStreamLinear, grouped_ops
from dashinfer_vlm.layers.grouped import GroupedLinear, expand, rounded
from dashinfer_vlm.layers.linear import Matrix, Nibbles, Unsummed, rows_of
from dashinfer_vlm.layers.norm import rms_norm
from tests.kernels.cuda.numbers import DEVICE, allowed, error
from tests.kernels.test_linear_int import weight_to_4_bits, weight_to_8_bits


@pytest.fixture(params=[True, False], ids=["copied by tiles", "by pointers"])
def _every_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before Hopper have no engine that copies tiles."""
    if not request.param:
        monkeypatch.setattr(skinny, "has_tiles", lambda x: False)


SHIFTED = 5
"""4 bits whose groups have zeros."""


def stored(weight: Tensor, bits: int) -> tuple[GroupedWeight | Tensor, Tensor]:
    """A weight in so many bits, and what its numbers stand for."""
    if bits == 16:
        return weight, weight
    grouped = rounded(weight, 8 if bits == 8 else 4)
    if bits == SHIFTED:
        shifts = torch.randint(-7, 9, grouped.scales.shape, device=DEVICE).bfloat16()
        grouped = replace(grouped, shifts=shifts)
    return grouped, expand(grouped, torch.float32)


@pytest.mark.usefixtures("_every_card")
@pytest.mark.parametrize("bits", [16, 8, 4, SHIFTED])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("num_rows", "size", "depth"), [(2, 40, 384), (5, 34, 300), (18, 66, 264), (130, 70, 384)])
def test_a_product_is_that_of_the_numbers(num_rows: int, size: int, depth: int, splits: int, bits: int) -> None:
    x = torch.randn(num_rows, depth + 8, device=DEVICE)[:, :depth]
    weight, numbers = stored(torch.randn(size, depth, device=DEVICE), bits)
    got = product(x, weight, splits=splits)
    assert error(got, x.double() @ numbers.double().t()) < 1e-5


@pytest.mark.parametrize(("bits", "splits", "is_gated"), [(16, 1, True), *each((16, 8, 4), (1, 2), (False,))])
@pytest.mark.parametrize("has_more", [False, True])
def test_what_comes_after_a_product_rides_in_it(bits: int, splits: int, is_gated: bool, has_more: bool) -> None:
    """With `has_more` a bias and a residual, in whose memory the result is."""
    x = torch.randn(3, 300, device=DEVICE)
    weight, numbers = stored(torch.randn(68, 300, device=DEVICE), bits)
    bias = torch.randn(68, device=DEVICE) if has_more else None
    want = F.linear(x.double(), numbers.double(), None if bias is None else bias.double())
    want = silu_mul(want) if is_gated else want
    residual = torch.randn_like(want).float() if has_more else None
    want = want if residual is None else want + residual
    got = product(x, weight, bias, silu_mul=is_gated, residual=residual, out=residual, splits=splits)
    assert residual is None or got is residual
    assert error(got, want) < 1e-5


def test_no_silu_rides_in_few_bits_or_parts() -> None:
    x, weight = torch.randn(2, 128, device=DEVICE), torch.randn(8, 128, device=DEVICE)
    for given, splits in ((stored(weight, 8)[0], None), (weight, 2)):
        with pytest.raises(ValueError, match="SiLU rides in whole products"):
            product(x, given, silu_mul=True, splits=splits)


def test_a_product_is_the_same_again() -> None:
    """What its programs count is zero again at the end of each; NaN in fresh memory is not added."""
    x, weight = torch.randn(5, 384, device=DEVICE), torch.randn(40, 384, device=DEVICE)
    first = product(x, weight, splits=3)
    assert error(first, x.double() @ weight.double().t()) < 1e-5
    assert all(torch.equal(product(x, weight, splits=3), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
@pytest.mark.parametrize("num_rows", [2, skinny.MOST_SHARED_ROWS])
def test_a_layer_of_16_bits_is_one_launch_for_few_rows(
    num_rows: int, epilogue: Epilogue, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((num_rows, 256), (32, 256), (32,)))
    monkeypatch.setattr(skinny, "WANTED_PROGRAMS", 0)  # of so few rows the library takes those with SiLU
    layer = CudaLinear(weight, bias, epilogue)
    want = EPILOGUES[epilogue](F.linear(x.double(), weight.double(), bias.double()))
    residual = torch.randn_like(want).to(dtype)
    wanted = want + residual.double()
    with mock.patch.object(F, "linear", side_effect=AssertionError), mock.patch.object(torch, "addmm", F.linear):
        assert error(layer(x), want) < allowed(dtype)
        assert layer(x, residual=residual, out=residual) is residual
    assert error(residual, wanted) < allowed(dtype)


def test_a_weight_whose_rows_begin_anywhere_is_left_to_the_library() -> None:
    x, weight = torch.randn(3, 258, device=DEVICE).bfloat16()[:, :257], torch.randn(8, 257, device=DEVICE).bfloat16()
    assert skinny.most_rows(weight, silu_mul=False) == 0
    assert error(CudaLinear(weight, None, "none")(x), x.double() @ weight.double().t()) < allowed(x.dtype)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        product(x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [2, skinny.MOST_WHOLE_ROWS])
def test_parts_are_left_to_the_norm_behind(num_rows: int, dtype: torch.dtype) -> None:
    depth = 128 * 2 * skinny.LEAST_ROUNDS
    x, weight, gains = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((num_rows, depth), (40, depth), (40,)))
    residual = torch.randn(num_rows, 40, device=DEVICE).to(dtype)
    want = residual.double() + x.double() @ weight.double().t()
    left = CudaStreamLinear(weight, None, "none")(x, residual=residual, out=residual)
    assert isinstance(left, Unsummed)
    assert len(left.parts) == 2
    normed = CudaLinear(torch.empty(8, 40, dtype=dtype), None, "none").normed(left, gains, 1e-6)
    assert isinstance(normed, Tensor)
    assert rows_of(left) is residual
    assert error(residual, want) < allowed(dtype)
    assert error(normed, rms_norm(want, gains.double(), 1e-6)) < 2 * allowed(dtype)


def test_whoever_norms_them_sums_parts() -> None:
    x, parts, gains = (torch.randn(*s, device=DEVICE) for s in ((2, 128), (3, 2, 128), (128,)))
    want = x + parts.sum(0)
    layer = GroupedLinear(rounded(torch.randn(8, 128, device=DEVICE), 8), None, "none", grouped_ops(CudaHead))
    normed = layer.normed(Unsummed(x, parts), gains, 1e-6)
    assert isinstance(normed, Tensor)
    assert error(normed, rms_norm(want, gains, 1e-6)) < 1e-5
    assert error(x, want) < 1e-6


def test_nothing_is_left_of_one_row_many_rows_and_rows_of_others() -> None:
    """`out` has to be the residual: else its rows would have to be copied first."""
    depth = 128 * 2 * skinny.LEAST_ROUNDS
    layer = CudaStreamLinear(torch.randn(40, depth, device=DEVICE).bfloat16(), None, "none")
    for num_rows in (1, skinny.MOST_WHOLE_ROWS + 1):
        residual = torch.randn(num_rows, 40, device=DEVICE).bfloat16()
        x = torch.randn(num_rows, depth, device=DEVICE).bfloat16()
        assert layer(x, residual=residual, out=residual) is residual
    assert isinstance(layer(torch.randn(2, depth, device=DEVICE).bfloat16()), Tensor)
    wide = CudaStreamLinear(torch.randn(40, depth, device=DEVICE), None, "none")  # of float32
    residual = torch.randn(2, 40, device=DEVICE)
    assert wide(torch.randn(2, depth, device=DEVICE), residual=residual, out=residual) is residual


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("depth", [128, 300])
def test_the_numbers_are_those_of_processors(bits: int, depth: int) -> None:
    weight = torch.randn(9, depth).bfloat16()
    weight[3] = 0
    want = weight_to_8_bits(weight, 128) if bits == 8 else weight_to_4_bits(weight, 128)
    assert torch.equal(expand(rounded(weight, bits), torch.float64), want)


def test_columns_are_shared_until_a_card_is_busy() -> None:
    assert num_splits(1000, 28) == 1
    assert num_splits(132, 28) == 2
    assert num_splits(56, 28) == 4  # each with seven rounds
    assert num_splits(24, 70) == 10  # eleven would leave one with nothing to do
    assert num_splits(1, 2) == 1


def test_who_multiplies_16_bits() -> None:
    """A weight whose columns are shared costs more with each row of x; of one with SiLU they are not."""
    large, small = (torch.empty(n * 64, 64, dtype=torch.bfloat16, device=DEVICE) for n in (133, 132))
    assert skinny.most_rows(large, silu_mul=False) == skinny.MOST_WHOLE_ROWS
    assert skinny.most_rows(small, silu_mul=False) == skinny.MOST_SHARED_ROWS
    assert skinny.most_rows(small, silu_mul=True) == 0
    assert skinny.most_rows(torch.empty(266 * 64, 64, dtype=torch.bfloat16), silu_mul=True) == skinny.MOST_WHOLE_ROWS
    assert skinny.most_rows(large.float(), silu_mul=False) == 0


def test_a_weight_of_another_depth_is_refused() -> None:
    weight, _ = stored(torch.randn(8, 128, device=DEVICE), 8)
    with pytest.raises(ValueError, match="the weight has 128 columns"):
        product(torch.randn(1, 64, device=DEVICE), weight)


@pytest.mark.parametrize("bits", [8, 4, SHIFTED])
def test_a_weight_is_expanded_as_the_reference_does_it(bits: int) -> None:
    weight, _ = stored(torch.randn(5, 300, device=DEVICE), bits)
    assert isinstance(weight, GroupedWeight)
    assert torch.equal(few_bits.expand(weight, torch.float32), expand(weight, torch.float32))


@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "quick_gelu"])
@pytest.mark.parametrize("num_rows", [2, MOST_ROWS + 1])
def test_a_layer_takes_few_rows_and_many(num_rows: int, epilogue: Epilogue) -> None:
    x, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((num_rows, 256), (32, 256), (32,)))
    grouped = rounded(weight, 8)
    layer = GroupedLinear(grouped, bias, epilogue, grouped_ops(CudaHead))
    want = EPILOGUES[epilogue](F.linear(x, expand(grouped, torch.float32), bias))
    residual = torch.randn_like(want)
    assert error(layer(x), want) < 1e-5
    wanted = want + residual
    assert layer(x, residual=residual, out=residual).data_ptr() == residual.data_ptr()
    assert error(residual, wanted) < 1e-5


@pytest.mark.parametrize("num_rows", [2, MOST_ROWS + 1])
def test_a_head_gives_float32(num_rows: int) -> None:
    x, grouped = torch.randn(num_rows, 128, device=DEVICE), rounded(torch.randn(40, 128, device=DEVICE), 8)
    head = GroupedLinear(grouped, None, "none", grouped_ops(CudaHead), is_head=True)
    assert head(x).dtype == torch.float32
    assert error(head(x), x @ expand(grouped, torch.float32).t()) < 1e-5


@pytest.mark.parametrize("zeros", [None, "all 8", "others"])
def test_4_bits_of_a_checkpoint_are_taken_as_they_are_stored(zeros: str | None) -> None:
    """In groups of 128; others are rounded anew."""
    numbers = torch.randint(16, (6, 300), dtype=torch.uint8)
    scales = torch.rand(6, 3) + 0.5
    of_groups = {None: None, "all 8": torch.full((6, 3), 8, dtype=torch.uint8)}.get(
        zeros, torch.randint(16, (6, 3), dtype=torch.uint8)
    )
    group = torch.arange(300) // 128
    less = 8 if of_groups is None else of_groups.float()[:, group]
    wide = (numbers.float() - less) * scales.bfloat16().float()[:, group]
    make = grouped_linears(DEVICE, torch.float32, 4, grouped_ops(CudaHead))
    for size, want in ((128, wide), (32, expand(rounded(wide, 4), torch.float32))):
        nibbles = Nibbles(size, of_groups is not None, lambda: (numbers, scales, of_groups))
        layer = make(Matrix("w", 6, 300, lambda: wide, nibbles=nibbles), None, "none")
        assert isinstance(layer, GroupedLinear)
        assert torch.equal(expand(layer.weight, torch.float32).cpu(), want.cpu())
        assert (layer.weight.shifts is not None) == (zeros == "others" and size == 128)
        x = torch.randn(2, 300, device=DEVICE)
        assert error(layer(x), x.double() @ want.double().to(DEVICE).t()) < 1e-5
