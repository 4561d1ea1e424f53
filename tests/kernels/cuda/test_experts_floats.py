"""Mixtures of experts in 8-bit floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.kernels.cuda import experts_floats
from dashinfer_vlm.kernels.cuda.experts_floats import Stack, multiply, tile_for
from dashinfer_vlm.kernels.cuda.launch import Tile
from dashinfer_vlm.layers import fp8
from dashinfer_vlm.layers.card_backend import in_floats
from dashinfer_vlm.layers.cuda import CudaExperts
from dashinfer_vlm.layers.experts import Routing
from dashinfer_vlm.layers.linear import Floats, Matrix
from dashinfer_vlm.models import loading
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.kernels.cuda.numbers import DEVICE, allowed, error
from tests.kernels.cuda.test_experts import given
from tests.kernels.cuda.test_fp8 import in_blocks
from tests.models.driving import Driver, prompt
from tests.models.test_stored import NATIVE, plain_floats, write_pair

Stacks = tuple[Stack, Stack]
EXACT = 1e-5 if DEVICE.type == "cpu" else 1e-2
"""Error against the same rounded factors in float64. A card adds products of 8-bit floats with fewer bits than float32
has, and another sum may be rounded otherwise."""
ROUNDED = 0.06
"""Error against factors that are not rounded."""


@pytest.fixture(params=[True, False], ids=["copied by tiles", "by pointers"])
def _every_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before Hopper have no engine that copies tiles."""
    if not request.param:
        monkeypatch.setattr(experts_floats, "has_tiles", lambda x: False)


def stack_of(matrices: Tensor, *, blocks: bool) -> Stack:
    """[E, N, K] rounded."""
    floats = [in_blocks(x.float()) if blocks else fp8.rounded(x, fp8.REFERENCE) for x in matrices]
    return Stack(torch.stack([x.numbers for x in floats]), torch.stack([x.scales for x in floats]))


def wide(stack: Stack) -> Tensor:
    """float64 [E, N, K] of what the numbers stand for."""
    _, num_rows, depth = stack.numbers.shape
    scales = stack.scales.double()
    if stack.is_in_blocks:
        scales = scales.repeat_interleave(128, 1)[:, :num_rows].repeat_interleave(128, 2)[:, :, :depth]
    return stack.numbers.double() * scales


def rounded(x: Tensor) -> Tensor:
    """A row as the kernels take it."""
    numbers, scales = fp8.quantise(x.float()[None])
    return (numbers.double() * scales.double())[0]


def wanted(x: Tensor, stacks: Stacks, chosen: Tensor, shares: Tensor, residual: Tensor, *, rounds: bool) -> Tensor:
    """Row by row, expert by expert, in float64."""
    y, (gate_up, down), taken = residual.double(), map(wide, stacks), rounded if rounds else Tensor.double
    for row, (of_row, shares_of_row) in enumerate(zip(chosen.tolist(), shares.tolist(), strict=True)):
        for expert, share in zip(of_row, shares_of_row, strict=True):
            gate, up = (gate_up[expert] @ taken(x[row])).chunk(2)
            y[row] += share * (down[expert] @ taken(F.silu(gate) * up))
    return y


@pytest.mark.usefixtures("_every_card")
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "count", "size", "inner", "blocks", "rows"),
    [
        (3, 5, 2, 272, 128, True, 16),
        (3, 5, 2, 72, 40, False, 64),  # rows that descriptors cannot copy
        (20, 3, 2, 160, 256, True, 64),
        (70, 2, 1, 272, 144, False, 128),
    ],
)
def test_rows_get_what_their_experts_make_of_them(
    num_rows: int, num_experts: int, count: int, size: int, inner: int, blocks: bool, rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(experts_floats, "tile_for", lambda *_, **__: Tile(rows, 128, 4, 3))
    x, gate_up, down, *others = given(num_rows, num_experts, count, size, inner)
    stacks = stack_of(gate_up, blocks=blocks), stack_of(down, blocks=blocks)
    got, residual = multiply(x, *stacks, *others), others[-1].double()
    assert error(got - residual, wanted(x, stacks, *others, rounds=True) - residual) < EXACT
    assert error(got - residual, wanted(x, stacks, *others, rounds=False) - residual) < ROUNDED


@pytest.mark.parametrize(
    ("num_rows", "count", "size", "inner", "blocks"),
    [(1, 1, 72, 40, False), (1, 8, 272, 128, True), (2, 3, 136, 256, True), (2, 3, 40, 136, False)],
)
def test_rows_by_themselves_are_not_rounded(
    num_rows: int, count: int, size: int, inner: int, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gate_up, down, *others = given(num_rows, 8, count, size, inner)
    stacks = stack_of(gate_up, blocks=blocks), stack_of(down, blocks=blocks)
    monkeypatch.setattr(experts_floats, "sort_pairs", None)
    assert error(multiply(x, *stacks, *others), wanted(x, stacks, *others, rounds=False)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "blocks"), [(1, False), (2, True), (18, False), (18, True)])
def test_rows_of_16_bits(num_rows: int, blocks: bool, dtype: torch.dtype) -> None:
    x, gate_up, down, *others = given(num_rows, 4, 2, 136, 128, dtype)
    stacks = stack_of(gate_up, blocks=blocks), stack_of(down, blocks=blocks)
    got = multiply(x, *stacks, *others)
    assert got.dtype == dtype
    rounds = num_rows > 2  # the interpreter cuts off what a card rounds, so that 8-bit floats are others
    assert error(got, wanted(x, stacks, *others, rounds=rounds)) < (ROUNDED if rounds else allowed(dtype))


def test_a_number_a_thousand_times_larger_than_the_others_takes_none_of_their_digits() -> None:
    """A row has one scale. The weight has nothing where it would drown the others."""
    x, gate_up, down, *others = given(20, 3, 2, 272, 128)
    x[:, 130] *= 1000
    gate_up[:, :, 130] = 0
    stacks = stack_of(gate_up, blocks=True), stack_of(down, blocks=True)
    residual = others[-1].double()
    got, want = multiply(x, *stacks, *others), wanted(x, stacks, *others, rounds=False)
    assert error(got - residual, want - residual) < ROUNDED


@pytest.mark.parametrize("num_rows", [1, 20])
def test_the_result_may_be_in_the_residuals_memory_and_rows_may_be_strided(num_rows: int) -> None:
    x, gate_up, down, chosen, shares, residual = given(num_rows, 5, 2, 72, 48)
    stacks = stack_of(gate_up, blocks=False), stack_of(down, blocks=False)
    wide_x, around = (torch.randn(num_rows, 100, device=DEVICE) for _ in range(2))
    wide_x[:, :72], around[:, :72] = x, residual
    want = multiply(x, *stacks, chosen, shares, residual)
    untouched, out = around[:, 72:].clone(), around[:, :72]
    assert multiply(wide_x[:, :72], *stacks, chosen, shares, out, out) is out
    assert torch.equal(out, want)
    assert torch.equal(around[:, 72:], untouched)


@pytest.mark.parametrize("num_rows", [2, 20])
def test_what_is_no_number_stays_in_its_row(num_rows: int) -> None:
    x, gate_up, down, *others = given(num_rows, 5, 2, 136, 48)
    x[1, 3] = torch.nan
    y = multiply(x, stack_of(gate_up, blocks=False), stack_of(down, blocks=False), *others)
    assert y.isfinite().all(1).tolist() == [row != 1 for row in range(num_rows)]


def test_tiles_have_as_many_rows_as_experts_have() -> None:
    assert [tile_for(mean).rows for mean in (0.1, 16, 17, 500)] == [16, 16, 64, 64]


def test_what_does_not_fit_is_refused() -> None:
    x, gate_up, down, chosen, shares, residual = given(3, 5, 2, 72, 40)
    ups, downs = stack_of(gate_up, blocks=False), stack_of(down, blocks=False)
    for tensors, told in (
        ((x, ups, Stack(downs.numbers[:4], downs.scales[:4]), chosen, shares, residual), "weights must fit x"),
        ((x, ups, Stack(downs.numbers, downs.scales[:, :9]), chosen, shares, residual), "of rows or of blocks"),
        ((x, ups, Stack(downs.numbers, downs.scales[:4]), chosen, shares, residual), "of rows or of blocks"),
        ((x, stack_of(gate_up, blocks=True), downs, chosen, shares, residual), "no block may have gates and ups"),
        ((x, ups, downs, chosen[:2], shares, residual), "for each row"),
        ((x, ups, downs, chosen, shares, residual[:2]), "residual and result"),
        ((x, ups, downs, chosen.t().contiguous().t(), shares, residual), "must be dense"),
    ):
        with pytest.raises(ValueError, match=told):
            multiply(*tensors)


@pytest.mark.parametrize("stored", ["in blocks", "by rows", "whole", "in part"])
def test_experts_are_those_of_the_checkpoint_where_it_has_all_of_them_in_8_bit_floats(stored: str) -> None:
    """Else all of them are rounded row by row."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    x, gate_up, down, *_ = given(5, 3, 2, 128, 128, dtype)

    def matrix(weight: Tensor, i: int) -> Matrix:
        floats = in_blocks(weight.float()) if stored != "by rows" else Floats(*fp8.quantise(weight), False)
        has_own = stored in ("in blocks", "by rows") or (stored == "in part" and i != 2)
        return Matrix(
            str(i), len(weight), weight.shape[1], lambda: weight, read_floats=(lambda: floats) if has_own else None
        )

    gate_ups, downs = ([matrix(weight, i) for i, weight in enumerate(stack)] for stack in (gate_up, down))
    layer = in_floats(DEVICE, dtype).experts(torch.randn(3, 128), gate_ups, downs, Routing(2, True))
    assert isinstance(layer, CudaExperts)
    for name, weights in (("gate_up", gate_up), ("down", down)):
        found = layer.multiply.keywords[name]  # type: ignore[attr-defined]
        want = stack_of(weights, blocks=stored == "in blocks")
        assert torch.equal(found.scales, want.scales)
        assert error(found.numbers.float(), want.numbers.float()) < 1e-2  # a tie may fall to either side
    y = layer(x, residual=None)
    assert error(y[:2], layer(x[:2], residual=None)) < ROUNDED


@pytest.mark.skipif(DEVICE.type == "cuda", reason="layers beside the experts want bfloat16 there")
def test_a_model_of_experts_gives_what_its_layers_give_one_by_one(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than two rows are rounded as dense layers round them."""
    stored, written = write_pair(
        checkpoint("qwen3_moe", dtype="bfloat16"), tmp_path, *NATIVE["compressed-tensors, rows"]
    )
    found = [logits(written)]
    for choose in (lambda *_: in_floats(DEVICE, torch.float32), plain_floats):
        monkeypatch.setattr(loading, "choose_backend", choose)
        found.append(logits(stored))
    whole, ours, plain = found
    assert error(ours, whole) < 0.1
    assert error(ours[:-1], plain[:-1]) < 1e-2


def logits(folder: Path) -> Tensor:
    """Of a few rows, and of one by itself."""
    driver = Driver(load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu")))
    with torch.inference_mode():
        return driver.run(driver.start(prompt(12)), 11)
