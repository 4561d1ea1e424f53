"""A row times a weight of 8 or 4 bits, or of 8-bit floats, with what rides in the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import fp8, narrow, rows
from dashinfer_vlm.kernels.cuda.gemv import MOST_NORMED
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers import fp8 as reference
from dashinfer_vlm.layers.activation import silu_mul
from dashinfer_vlm.layers.grouped import expand, rounded
from dashinfer_vlm.layers.linear import Floats
from dashinfer_vlm.layers.norm import rms_norm
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error
from tests.kernels.cuda.test_fp8 import in_blocks
from tests.kernels.cuda.test_skinny import SHIFTED, stored

LONG = MOST_NORMED + 500
"""Columns that are taken in several rounds, the last of which is cut."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers: Tensor = torch.randn(*shape, device=DEVICE)
    return numbers.to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_that_there_is(bits: int) -> None:
    """One of them in each column, by a row that asks for one after the other."""
    num_numbers = 1 << bits
    stored = torch.arange(num_numbers, device=DEVICE)
    if bits == 8:
        numbers = (stored - 128).to(torch.int8).repeat_interleave(128).view(num_numbers, 128)
    else:
        numbers = (stored | stored << 4).to(torch.uint8).repeat_interleave(64).view(num_numbers, 64)
    scales = torch.ones(num_numbers, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = GroupedWeight(numbers, scales, 128, bits)
    want = (stored - num_numbers // 2).float()
    for column in range(0, 128, 1 if bits == 4 else 7):
        x = torch.zeros(1, 128, device=DEVICE)
        x[0, column] = 1
        assert torch.equal(narrow.of_groups(x, weight)[0], want), column


@pytest.mark.parametrize("bits", [8, 4, SHIFTED])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "rides", [(), ("bias",), ("gains",), ("gate",), ("residual",), ("bias", "gains", "gate", "residual")]
)
@pytest.mark.parametrize(("size", "depth"), [(138, 96), (34, 300), (10, LONG)])
def test_a_product_in_groups(size: int, depth: int, rides: tuple[str, ...], dtype: torch.dtype, bits: int) -> None:
    if "gains" in rides and depth > MOST_NORMED:
        rides = tuple(name for name in rides if name != "gains")
    is_gated = "gate" in rides
    x, (weight, _) = random(1, depth + 3, dtype=dtype)[:, :depth], stored(random(size, depth) / depth**0.5, bits)
    assert isinstance(weight, GroupedWeight)
    bias = random(size, dtype=dtype) if "bias" in rides else None
    gains = random(depth, dtype=dtype) if "gains" in rides else None
    residual = random(1, size // 2 if is_gated else size, dtype=dtype) if "residual" in rides else None
    want = x.double() if gains is None else rms_norm(x, gains, 1e-6).double()
    want = F.linear(want, expand(weight, torch.float64), None if bias is None else bias.double())
    want = silu_mul(want) if is_gated else want
    want = want if residual is None else want + residual.double()
    out = residual if residual is not None else torch.full(want.shape, torch.nan, device=DEVICE, dtype=dtype)
    got = narrow.of_groups(x, weight, bias, gains=gains, eps=1e-6, silu_mul=is_gated, residual=residual, out=out)
    assert got is out
    assert error(got, want) < allowed(dtype) * (
        2 if gains is not None else 1
    )  # the interpreter cuts where a card rounds


def test_a_head_gives_float32() -> None:
    x, weight = random(1, 200, dtype=torch.bfloat16), rounded(random(70, 200), 8)
    got = narrow.of_groups(x, weight, dtype=torch.float32)
    assert got.dtype == torch.float32
    assert error(got, x.double() @ expand(weight, torch.float64).t()) < 1e-5


@pytest.mark.parametrize("is_in_blocks", [False, True])
@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize(("size", "depth"), [(138, 96), (300, 300), (10, LONG)])
def test_a_product_of_floats(size: int, depth: int, has_more: bool, is_in_blocks: bool) -> None:
    numbers, scales = fp8.quantise(random(1, depth), fp8.BLOCK if is_in_blocks else 0)
    weight = in_blocks(random(size, depth)) if is_in_blocks else Floats(*reference.quantise(random(size, depth)), False)
    bias, residual = (random(*shape) if has_more else None for shape in ((size,), (1, size)))
    wide = numbers.double() * (scales.repeat_interleave(128, 1)[:, :depth] if is_in_blocks else scales).double()
    per_number = weight.scales
    if is_in_blocks:
        per_number = per_number.repeat_interleave(128, 0)[:size].repeat_interleave(128, 1)[:, :depth]
    want = F.linear(wide, weight.numbers.double() * per_number.double(), None if bias is None else bias.double())
    want = want if residual is None else want + residual
    out = torch.full_like(want, torch.nan, dtype=torch.float32) if residual is None else residual
    got = narrow.of_floats(numbers, scales, weight.numbers, weight.scales, torch.float32, bias, residual, out)
    assert got is out
    assert error(got, want) < 1e-5


def test_the_norm_rounds_as_a_launch_of_its_own_does() -> None:
    x, gains = random(1, 200, dtype=torch.bfloat16), random(200, dtype=torch.bfloat16)
    weight = rounded(random(64, 200), 4)
    alone = narrow.of_groups(rows.rms_norm(x, gains, 1e-6), weight)
    assert torch.equal(narrow.of_groups(x, weight, gains=gains, eps=1e-6), alone)


def test_what_does_not_fit_is_refused() -> None:
    weight = rounded(random(8, 128), 8)
    with pytest.raises(ValueError, match="one dense row of 128"):
        narrow.of_groups(random(2, 128), weight)
    with pytest.raises(ValueError, match="as long as"):
        narrow.of_groups(random(1, 128), weight, random(7))
    with pytest.raises(ValueError, match="residual and result"):
        narrow.of_groups(random(1, 128), weight, residual=random(1, 4))
    numbers, scales = fp8.quantise(random(1, 128))
    floats = Floats(*reference.quantise(random(8, 128)), False)
    with pytest.raises(ValueError, match="one dense row of 128"):
        narrow.of_floats(numbers[:, :64], scales, floats.numbers, floats.scales, torch.float32)
    with pytest.raises(ValueError, match="scales must be"):
        narrow.of_floats(numbers, scales, floats.numbers, floats.scales[:4], torch.float32)
