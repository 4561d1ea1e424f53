"""Products of few rows of 8-bit floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import fp8, skinny_floats
from dashinfer_vlm.kernels.cuda.skinny_floats import product
from dashinfer_vlm.layers import fp8 as reference
from dashinfer_vlm.layers.cuda import FP8_OPS
from dashinfer_vlm.layers.fp8 import Fp8Linear
from dashinfer_vlm.layers.linear import Floats
from tests.kernels.cuda.numbers import DEVICE, error
from tests.kernels.cuda.test_fp8 import in_blocks
from tests.kernels.cuda.test_narrow import random


def factors(num_rows: int, size: int, depth: int, *, blocks: bool) -> tuple[Tensor, Tensor, Floats, Tensor, Tensor]:
    """Rows, their scales, a weight, and what both stand for, in float64."""
    numbers, scales = fp8.quantise(random(num_rows, depth), fp8.BLOCK if blocks else 0)
    weight = in_blocks(random(size, depth)) if blocks else Floats(*reference.quantise(random(size, depth)), False)
    of_rows, of_weight = scales.double(), weight.scales.double()
    if blocks:
        of_rows = of_rows.repeat_interleave(128, 1)[:, :depth]
        of_weight = of_weight.repeat_interleave(128, 0)[:size].repeat_interleave(128, 1)[:, :depth]
    return numbers, scales, weight, numbers.double() * of_rows, weight.numbers.double() * of_weight


@pytest.mark.parametrize("is_tiled", [True, False])
@pytest.mark.parametrize("is_in_blocks", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("num_rows", "size", "depth"), [(2, 138, 96), (18, 300, 400), (70, 10, 1040)])
def test_a_product_is_that_of_the_numbers(
    num_rows: int,
    size: int,
    depth: int,
    splits: int,
    is_in_blocks: bool,
    is_tiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cards before Hopper have no engine that copies tiles."""
    if not is_tiled:
        monkeypatch.setattr(skinny_floats, "has_tiles", lambda x: False)
    numbers, scales, weight, rows, wide = factors(num_rows, size, depth, blocks=is_in_blocks)
    bias, residual = random(size), random(num_rows, size)
    want = F.linear(rows, wide, bias.double()) + residual
    got = product(
        numbers,
        scales,
        weight.numbers,
        weight.scales,
        torch.float32,
        bias,
        residual,
        residual,
        min(splits, -(-depth // 128)),
    )
    assert got is residual
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("num_rows", [1, 2, skinny_floats.MOST_ROWS])
def test_a_layer_of_few_rows_is_one_launch(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    _, _, weight, _, wide = factors(1, 40, 256, blocks=False)
    x, bias = random(num_rows, 256), random(40)
    numbers, scales = reference.quantise(x)
    want = F.linear(numbers.double() * scales, wide, bias.double())
    assert error(Fp8Linear(weight, bias, "none", FP8_OPS)(x), want) < 2e-2  # the interpreter rounds some rows otherwise


def test_what_does_not_fit_is_refused() -> None:
    numbers, scales, weight, _, _ = factors(2, 8, 128, blocks=False)
    with pytest.raises(ValueError, match="the weight has 128 columns"):
        product(numbers[:, :64], scales, weight.numbers, weight.scales, torch.float32)
    with pytest.raises(ValueError, match="scales must be"):
        product(numbers, scales, weight.numbers, weight.scales[:4], torch.float32)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        product(numbers, scales, torch.zeros(8, 136, device=DEVICE).to(weight.numbers.dtype)[:, 3:131], weight.scales,
                torch.float32)  # fmt: skip
