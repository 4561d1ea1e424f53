"""8-bit floats: activations and weights as they are rounded, and products of what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import fp8, rows
from dashinfer_vlm.layers import fp8 as reference
from dashinfer_vlm.layers import norm
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue
from dashinfer_vlm.layers.cuda import FP8_OPS
from dashinfer_vlm.layers.fp8 import REFERENCE, Fp8Linear, Fp8Ops, rounded
from dashinfer_vlm.layers.linear import Floats
from tests.kernels.cuda.numbers import DEVICE, error

OPS = pytest.mark.parametrize("ops", [REFERENCE, FP8_OPS], ids=["reference", "kernels"])


def in_blocks(weight: torch.Tensor) -> Floats:
    """Rounded block by block, as checkpoints are."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padded = F.pad(weight, (0, columns * 128 - weight.shape[1], 0, rows * 128 - weight.shape[0]))
    blocks = padded.view(rows, 128, columns, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    numbers = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[: weight.shape[0], : weight.shape[1]]
    return Floats(numbers.to(torch.float8_e4m3fn).contiguous(), scales, is_in_blocks=True)


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("num_rows", "depth"), [(1, 16), (5, 300), (3, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_as_the_reference_rounds_them(
    num_rows: int, depth: int, group: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(num_rows, depth + 3, device=DEVICE) * 100).to(dtype)[:, :depth]
    x[0] = 0
    numbers, scales = fp8.quantise(x, group)
    wanted, wanted_scales = reference.quantise(x, group)
    assert error(scales, wanted_scales) < 1e-6
    assert error(numbers.float(), wanted.float()) < 1e-2  # a tie may fall to either side
    assert not numbers[0].float().any()


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("num_rows", "depth"), [(1, 16), (5, 300), (3, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_where_they_are_made_as_they_are_afterwards(
    num_rows: int, depth: int, group: int, dtype: torch.dtype
) -> None:
    x, wide = ((torch.randn(num_rows, size + 3, device=DEVICE) * 8).to(dtype)[:, :size] for size in (depth, 2 * depth))
    gains = torch.randn(depth, device=DEVICE).to(dtype)
    for found, made in (
        (fp8.rms_norm(x, gains, 1e-6, group), rows.rms_norm(x, gains, 1e-6)),
        (fp8.silu_mul(wide, group), rows.silu_mul(wide)),
    ):
        for ours, apart in zip(found, fp8.quantise(made, group), strict=True):
            assert torch.equal(ours.float(), apart.float())


@OPS
@pytest.mark.parametrize("is_in_blocks", [False, True])
def test_layers_hand_over_rows_that_are_rounded(ops: Fp8Ops, is_in_blocks: bool) -> None:
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    x, gains, *weights = (
        torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((3, 144), (144,), (320, 144), (144, 160))
    )
    up, down = (in_blocks(w.float()) if is_in_blocks else rounded(w, REFERENCE) for w in weights)
    first, last = Fp8Linear(up, None, "silu_mul", ops), Fp8Linear(down, None, "none", ops)
    handed = last(first.into(first.normed(x, gains, 1e-6), last), residual=x)
    apart = last(first(norm.rms_norm(x, gains, 1e-6)), residual=x)
    assert handed.dtype == dtype
    assert error(handed, apart) < (1e-6 if ops is REFERENCE else 5e-3)  # a tie may fall to either side


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("group", [0, 128])
def test_what_is_no_number_stays_none(bad: float, group: int) -> None:
    x = torch.randn(3, 256, device=DEVICE)
    x[1, 5] = bad
    ones = torch.ones(256, device=DEVICE)
    for ops in (REFERENCE, FP8_OPS):
        made = ops.quantise(x, group), ops.rms_norm(x, ones, 1e-6, group), ops.silu_mul(torch.cat((x, x), 1), group)
        for numbers, scales in made:
            wide = numbers.float() * scales.repeat_interleave(group or 256, 1)
            assert wide.isfinite().all(1).tolist() == [True, False, True]


def test_rounding_keeps_three_bits_behind_the_first() -> None:
    x = torch.randn(4, 257, device=DEVICE)
    for group in (0, 128):
        numbers, scales = reference.quantise(x, group)
        restored = numbers.float() * scales.repeat_interleave(group or 257, 1)[:, :257]
        assert error(restored, x) < 0.03


@pytest.mark.parametrize(("num_rows", "size", "depth"), [(1, 40, 128), (17, 130, 300), (70, 200, 130)])
def test_a_product_in_blocks_is_that_of_the_numbers(num_rows: int, size: int, depth: int) -> None:
    x, scales = reference.quantise(torch.randn(num_rows, depth, device=DEVICE), 128)
    weight = in_blocks(torch.randn(size, depth, device=DEVICE))
    want = reference.block_product(x, scales, weight.numbers, weight.scales, torch.float64)
    got = fp8.block_product(x, scales, weight.numbers, weight.scales, torch.float32)
    assert error(got, want) < 1e-5


@OPS
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("is_in_blocks", [False, True])
def test_a_layer_is_the_definition_with_rounded_factors(ops: Fp8Ops, epilogue: Epilogue, is_in_blocks: bool) -> None:
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    x, weight, bias = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((3, 144), (160, 144), (160,)))
    layer = Fp8Linear(in_blocks(weight.float()) if is_in_blocks else rounded(weight, REFERENCE), bias, epilogue, ops)
    want = EPILOGUES[epilogue](F.linear(x.float(), weight.float(), bias.float()))
    residual = torch.randn_like(want).to(dtype)
    assert error(layer(x), want) < 0.06
    assert error(layer(x, residual=residual) - residual, want) < 0.06
    before = residual.clone()
    assert layer(x, residual=residual, out=residual).data_ptr() == residual.data_ptr()
    assert error(residual - before, want) < 0.06


@OPS
@pytest.mark.parametrize("is_in_blocks", [False, True])
def test_a_layer_of_no_rows_gives_none(ops: Fp8Ops, is_in_blocks: bool) -> None:
    """As the last one of a step that wants no logits."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    x, weight = torch.empty(0, 144, dtype=dtype, device=DEVICE), torch.randn(160, 144, device=DEVICE).to(dtype)
    layer = Fp8Linear(in_blocks(weight.float()) if is_in_blocks else rounded(weight, REFERENCE), None, "none", ops)
    assert layer(x).shape == (0, 160)
    assert layer(x, residual=x.new_empty(0, 160)).dtype == dtype


def test_kernels_and_reference_make_the_same_layer() -> None:
    x, weight = torch.randn(7, 160, device=DEVICE), torch.randn(96, 160, device=DEVICE)
    if DEVICE.type == "cuda":
        x, weight = x.bfloat16(), weight.bfloat16()
    for floats in (rounded(weight, REFERENCE), in_blocks(weight.float())):
        ours, plain = (Fp8Linear(floats, None, "none", ops)(x) for ops in (FP8_OPS, REFERENCE))
        assert error(ours, plain) < 5e-3
