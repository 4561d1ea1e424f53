"""A row times a weight, with all that can ride in the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import gemv, rows
from dashinfer_vlm.kernels.cuda.gemv import MOST_NORMED, product, tile_for
from dashinfer_vlm.layers.activation import Epilogue, silu_mul
from dashinfer_vlm.layers.cuda import CudaLinear
from dashinfer_vlm.layers.norm import rms_norm
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error

LONG = MOST_NORMED + 500
"""Columns that are taken in several rounds, the last of which is cut."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers: Tensor = torch.randn(*shape, device=DEVICE) / shape[-1] ** 0.5
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "rides", [(), ("bias",), ("gains",), ("gate",), ("residual",), ("bias", "gains", "gate", "residual")]
)
@pytest.mark.parametrize(("size", "depth"), [(138, 96), (34, 300), (10, LONG)])
def test_a_product_and_what_rides_in_it(size: int, depth: int, rides: tuple[str, ...], dtype: torch.dtype) -> None:
    if "gains" in rides and depth > MOST_NORMED:
        rides = tuple(name for name in rides if name != "gains")
    is_gated = "gate" in rides
    x, weight = random(1, depth + 3, dtype=dtype)[:, :depth], random(size + 1, depth + 5, dtype=dtype)[:size, :depth]
    bias = random(size, dtype=dtype) if "bias" in rides else None
    gains = random(depth, dtype=dtype) if "gains" in rides else None
    residual = random(1, size // 2 if is_gated else size, dtype=dtype) if "residual" in rides else None
    want = x.double() if gains is None else rms_norm(x.double(), gains.double(), 1e-6)
    want = F.linear(want, weight.double(), None if bias is None else bias.double())
    want = silu_mul(want) if is_gated else want
    want = want if residual is None else want + residual.double()
    out = residual if residual is not None else torch.full(want.shape, torch.nan, device=DEVICE, dtype=dtype)
    got = product(x, weight, bias, gains=gains, eps=1e-6, silu_mul=is_gated, residual=residual, out=out)
    assert got is out
    # SiLU rounds three times, and the interpreter cuts off where a card rounds
    assert error(got, want) < allowed(dtype) * (2 if is_gated else 1)


def test_the_norm_rounds_as_a_launch_of_its_own_does() -> None:
    x, weight, gains = (random(*shape, dtype=torch.bfloat16) for shape in ((1, 200), (64, 200), (200,)))
    alone = product(rows.rms_norm(x, gains, 1e-6), weight)
    assert torch.equal(product(x, weight, gains=gains, eps=1e-6), alone)


@pytest.mark.parametrize("epilogue", ["none", "silu_mul"])
def test_a_layer_gives_one_row_what_it_gives_several(epilogue: Epilogue) -> None:
    layer = CudaLinear(random(64, 200), random(64), epilogue)
    x, gains = random(3, 200), random(200)
    several = layer(layer.normed(x, gains, 1e-6))
    alone = torch.cat([layer(layer.normed(x[i : i + 1], gains, 1e-6)) for i in range(3)])
    assert error(alone, several) < 1e-5


def test_a_row_too_long_for_the_norm_is_normed_before() -> None:
    layer = CudaLinear(random(8, LONG), None, "none")
    x, gains = random(1, LONG), random(LONG)
    assert error(layer(layer.normed(x, gains, 1e-6)), F.linear(rms_norm(x, gains, 1e-6), layer.weight)) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one dense row"):
        product(random(2, 64), random(8, 64))
    with pytest.raises(ValueError, match="must agree"):
        product(random(1, 64), random(8, 63))
    with pytest.raises(ValueError, match="as long as"):
        product(random(1, 64), random(8, 64), random(7))
    with pytest.raises(ValueError, match="one dense row"):
        product(random(1, 64), random(8, 64), residual=random(1, 4))
    with pytest.raises(ValueError, match="too long"):
        product(random(1, LONG), random(8, LONG), gains=random(LONG))


def test_rows_are_held_as_a_whole_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "INTERPRETED", False)
    assert tile_for(2048, 1536).columns == 2048
    assert tile_for(2048, MOST_NORMED).columns == MOST_NORMED
    assert tile_for(1536, MOST_NORMED + 1).columns < MOST_NORMED
