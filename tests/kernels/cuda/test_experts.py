"""Mixtures of experts: who is chosen, and what the chosen make of each row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import experts
from dashinfer_vlm.kernels.cuda.experts import choose, multiply, rows_for
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error

Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=[True, False], ids=["copied by tiles", "by pointers"])
def _every_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before Hopper have no engine that copies tiles."""
    if not request.param:
        monkeypatch.setattr(experts, "has_tiles", lambda x: False)


def given(
    num_rows: int, num_experts: int, count: int, size: int, inner: int, dtype: torch.dtype = torch.float32
) -> Given:
    """x, gate and up, down, chosen, shares, residual; nobody chose the last expert but where it has to be."""
    x, gate_up, down, residual = (
        (torch.randn(*shape, device=DEVICE) / shape[-1] ** 0.5).to(dtype)
        for shape in ((num_rows, size), (num_experts, 2 * inner, size), (num_experts, size, inner), (num_rows, size))
    )
    logits = torch.randn(num_rows, num_experts, device=DEVICE)
    if count < num_experts:
        logits[:, -1] = -9
    shares, chosen = logits.softmax(1).topk(count)
    return 8 * x, gate_up, down, chosen.int(), shares.to(dtype), residual


def wanted(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, shares: Tensor, residual: Tensor) -> Tensor:
    """Row by row, expert by expert, in float64."""
    y = residual.double()
    for row, (of_row, shares_of_row) in enumerate(zip(chosen.tolist(), shares.tolist(), strict=True)):
        for expert, share in zip(of_row, shares_of_row, strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            y[row] += share * (down[expert].double() @ (F.silu(gate) * up))
    return y


@pytest.mark.usefixtures("_every_card")
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "count", "size", "inner", "rows"),
    [
        (3, 5, 2, 72, 40, 16),
        (3, 8, 1, 136, 72, 64),
        (3, 3, 3, 64, 18, 16),  # rows of `down` that descriptors cannot copy
        (40, 8, 1, 72, 136, 16),
        (40, 5, 3, 136, 40, 64),
        (130, 5, 3, 40, 72, 128),
        (3, 513, 11, 40, 24, 16),
    ],
)
def test_rows_get_what_their_experts_make_of_them(
    num_rows: int, num_experts: int, count: int, size: int, inner: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "rows_for", lambda *_, **__: rows)
    tensors = given(num_rows, num_experts, count, size, inner)
    assert error(multiply(*tensors), wanted(*tensors)) < 1e-5


@pytest.mark.parametrize(("num_rows", "count", "inner"), [(1, 1, 72), (1, 3, 40), (2, 3, 136), (2, 8, 20), (2, 11, 20)])
def test_rows_by_themselves_are_two_launches(
    num_rows: int, count: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = given(num_rows, 12, count, 72, inner)
    monkeypatch.setattr(experts, "sort_pairs", None)
    assert error(multiply(*tensors), wanted(*tensors)) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_rows", "num_experts"), [(1, 5), (18, 8), (60, 4), (70, 2)])
def test_every_type_is_summed_in_float32(num_rows: int, num_experts: int, dtype: torch.dtype) -> None:
    """By each kernel, with 16 bits in tiles of 16, 64 and 128 rows."""
    tensors = given(num_rows, num_experts, 2, 136, 72, dtype)
    got = multiply(*tensors)
    assert got.dtype == dtype
    assert error(got, wanted(*tensors)) < allowed(dtype)


@pytest.mark.parametrize("num_rows", [2, 40])
@pytest.mark.parametrize("expert", [0, 4])
def test_all_rows_may_choose_one_expert(expert: int, num_rows: int) -> None:
    x, gate_up, down, chosen, shares, residual = given(num_rows, 5, 1, 72, 40)
    tensors = (x, gate_up, down, torch.full_like(chosen, expert), shares, residual)
    assert error(multiply(*tensors), wanted(*tensors)) < 1e-5


@pytest.mark.parametrize("num_rows", [1, 20])
def test_the_result_may_be_in_the_residuals_memory_and_rows_may_be_strided(num_rows: int) -> None:
    x, gate_up, down, chosen, shares, residual = given(num_rows, 5, 2, 72, 40)
    wide_x, wide = (torch.randn(num_rows, 100, device=DEVICE) for _ in range(2))
    wide_x[:, :72], wide[:, :72] = x, residual
    want = wanted(x, gate_up, down, chosen, shares, residual)
    untouched, out = wide[:, 72:].clone(), wide[:, :72]
    assert multiply(wide_x[:, :72], gate_up, down, chosen, shares, out, out) is out
    assert error(out, want) < 1e-5
    assert torch.equal(wide[:, 72:], untouched)


def test_a_result_is_the_same_again_and_that_of_any_other_step() -> None:
    """To the bit: neither the order of programs nor other rows matter while tiles are as tall."""
    x, gate_up, down, chosen, shares, residual = given(40, 16, 3, 72, 40)
    first = multiply(x, gate_up, down, chosen, shares, residual)
    assert torch.equal(multiply(x, gate_up, down, chosen, shares, residual), first)
    some = slice(7, 19)
    assert torch.equal(multiply(x[some], gate_up, down, chosen[some], shares[some], residual[some]), first[some])


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(("num_pairs", "num_experts"), [(4, 128), (200, 7), (1500, 12), (130, 1)])
def test_every_pair_is_in_one_tile_of_its_expert(num_pairs: int, num_experts: int, rows: int) -> None:
    chosen = torch.randint(0, num_experts, (num_pairs, 1), device=DEVICE).int()
    chosen[chosen == 3] = 0  # nobody's
    of_tiles, pairs = experts.sort_pairs(chosen, num_experts, rows)
    assert len(of_tiles) == min(num_pairs, num_experts) + num_pairs // rows
    found: list[int] = []
    for expert, tile in zip(of_tiles.tolist(), pairs.view(-1, rows).tolist(), strict=True):
        if expert >= 0:
            held = [pair for pair in tile if pair >= 0]
            assert held
            assert tile == held + [-1] * (rows - len(held))
            assert {int(chosen[pair]) for pair in held} == {expert}
            found += held
    assert sorted(found) == list(range(num_pairs))
    assert found == chosen[:, 0].argsort(stable=True).tolist()


def test_tiles_have_as_many_rows_as_experts_have() -> None:
    assert [rows_for(mean, 2, is_roomy=True) for mean in (0.1, 8, 9, 64, 65)] == [16, 16, 64, 64, 128]
    assert rows_for(500, 2, is_roomy=False) == 64
    assert rows_for(500, 4, is_roomy=True) == 16


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "count"), [(5, 1), (8, 3), (128, 8), (512, 10), (6, 6)])
def test_the_most_probable_are_chosen(num_experts: int, count: int, normalise: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(3, num_experts + 2, device=DEVICE).to(dtype)[:, :num_experts]
    want, places = logits.float().softmax(1).sort(dim=1, descending=True, stable=True)
    want, places = want[:, :count], places[:, :count]
    chosen, shares = choose(logits, count, normalise=normalise)
    assert (chosen.dtype, shares.dtype) == (torch.int32, dtype)
    assert torch.equal(chosen.long(), places)
    assert error(shares, want / want.sum(1, keepdim=True) if normalise else want) < allowed(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_experts", "count"), [(6, 1), (6, 4), (512, 10)])
def test_a_shared_expert_comes_last_by_its_own_share(num_experts: int, count: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, num_experts + 1, device=DEVICE).to(dtype)
    places, want = choose(logits[:, :-1], count, normalise=True)
    chosen, shares = choose(logits, count, normalise=True, has_shared=True)
    assert torch.equal(chosen[:, :count], places)
    assert error(shares[:, :count], want) < allowed(dtype)
    assert (chosen[:, count] == num_experts).all()
    assert error(shares[:, count], logits[:, -1].float().sigmoid()) < allowed(dtype)


def test_of_equal_ones_the_first_is_chosen_and_nothing_else_of_what_is_no_number() -> None:
    """Rows that nobody owns may hold anything; whom they choose must be there."""
    logits = torch.zeros(4, 6, device=DEVICE)
    logits[1, 4] = 1
    logits[2], logits[3, 2] = torch.nan, torch.nan
    chosen, shares = choose(logits, 3, normalise=True)
    assert chosen.tolist() == [[0, 1, 2], [4, 0, 1], [0, 1, 2], [0, 1, 2]]
    assert torch.equal(shares[0], torch.full((3,), 1 / 3, device=DEVICE))


def test_what_does_not_fit_is_refused() -> None:
    x, gate_up, down, chosen, shares, residual = given(3, 5, 2, 72, 40)
    for tensors, told in (
        ((x, gate_up, down[:4], chosen, shares, residual), "weights must fit x"),
        ((x, gate_up.bfloat16(), down, chosen, shares, residual), "of one type"),
        ((x, gate_up, down, chosen[:2], shares, residual), "for each row"),
        ((x, gate_up, down, chosen, shares, residual[:2]), "residual and result"),
        ((x, gate_up, down, chosen.t().contiguous().t(), shares, residual), "must be dense"),
    ):
        with pytest.raises(ValueError, match=told):
            multiply(*tensors)
    with pytest.raises(ValueError, match="at least 6 experts"):
        choose(torch.randn(2, 5, device=DEVICE), 6, normalise=True)
