"""Mixtures of experts in 8 and 4 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from card_checks.models import BLOCK_SIZE, RandomWeights, published_config, text_batch
from dashinfer_vlm.kernels.cuda import experts_grouped
from dashinfer_vlm.kernels.cuda.experts_grouped import multiply, tile_for
from dashinfer_vlm.kernels.cuda.launch import Tile
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers import grouped
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.card_backend import in_groups
from dashinfer_vlm.layers.cuda import CudaExperts
from dashinfer_vlm.layers.experts import Routing
from dashinfer_vlm.layers.linear import Matrix, Nibbles
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.models.model import LoadedModel
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error
from tests.kernels.cuda.test_experts import given, wanted

BITS = pytest.mark.parametrize(
    ("bits", "shifted"), [(8, False), (4, False), (4, True)], ids=["8 bits", "4 bits", "4 bits with zeros"]
)


@pytest.fixture(params=[True, False], ids=["copied by tiles", "by pointers"])
def _every_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before Hopper have no engine that copies tiles."""
    if not request.param:
        monkeypatch.setattr(experts_grouped, "has_tiles", lambda x: False)


Given = tuple[Tensor, GroupedWeight, GroupedWeight, Tensor, Tensor, Tensor]


def few(matrices: Tensor, bits: int) -> GroupedWeight:
    """[E, N, K], rounded."""
    return grouped.rounded(matrices.flatten(0, 1), bits)


def with_shifts(weight: GroupedWeight) -> GroupedWeight:
    return replace(weight, shifts=torch.randint_like(weight.scales, -3, 4))


def rounded(
    bits: int, shifted: bool, num_rows: int, num_experts: int, count: int, size: int, inner: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Given, Tensor]:  # fmt: skip
    """As `given`, the weights in few bits; what they stand for makes of it, in float64."""
    x, gate_up, down, *others = given(num_rows, num_experts, count, size, inner, dtype)
    weights = few(gate_up, bits), few(down, bits)
    if shifted:
        weights = with_shifts(weights[0]), with_shifts(weights[1])
    ups, downs = (grouped.expand(weight, torch.float64).view(num_experts, -1, weight.depth) for weight in weights)
    chosen, shares, residual = others
    return (x, *weights, chosen, shares, residual), wanted(x, ups, downs, chosen, shares, residual)


@BITS
@pytest.mark.usefixtures("_every_card")
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "count", "size", "inner", "rows"),
    [(3, 5, 2, 272, 128, 16), (20, 3, 2, 72, 136, 64), (70, 2, 1, 136, 40, 128)],
)
def test_rows_get_what_their_experts_make_of_them(
    num_rows: int, num_experts: int, count: int, size: int, inner: int, rows: int, bits: int, shifted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(experts_grouped, "tile_for", lambda *_, **__: Tile(rows, 128, 4, 3))
    tensors, want = rounded(bits, shifted, num_rows, num_experts, count, size, inner)
    assert error(multiply(*tensors), want) < 1e-5


@BITS
@pytest.mark.parametrize(
    ("num_rows", "count", "size", "inner"), [(1, 1, 72, 40), (1, 8, 272, 128), (2, 3, 136, 264), (2, 3, 40, 136)]
)
def test_rows_by_themselves_are_not_sorted(
    num_rows: int, count: int, size: int, inner: int, bits: int, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, want = rounded(bits, shifted, num_rows, 8, count, size, inner)
    monkeypatch.setattr(experts_grouped, "sort_pairs", None)
    assert error(multiply(*tensors), want) < 1e-5


@BITS
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_rows", [1, 18])
def test_every_type_is_summed_in_float32(num_rows: int, dtype: torch.dtype, bits: int, shifted: bool) -> None:
    """The interpreter cuts off what is handed from a launch to the next, which a card rounds."""
    tensors, want = rounded(bits, shifted, num_rows, 4, 2, 136, 72, dtype)
    got = multiply(*tensors)
    assert got.dtype == dtype
    assert error(got, want) < 2 * allowed(dtype)


@BITS
@pytest.mark.parametrize("num_rows", [1, 20])
def test_the_result_may_be_in_the_residuals_memory_and_rows_may_be_strided(
    num_rows: int, bits: int, shifted: bool
) -> None:
    (x, ups, downs, chosen, shares, residual), _ = rounded(bits, shifted, num_rows, 5, 2, 72, 48)
    wide_x, around = (torch.randn(num_rows, 100, device=DEVICE) for _ in range(2))
    wide_x[:, :72], around[:, :72] = x, residual
    want = multiply(x, ups, downs, chosen, shares, residual)
    untouched, out = around[:, 72:].clone(), around[:, :72]
    assert multiply(wide_x[:, :72], ups, downs, chosen, shares, out, out) is out
    assert torch.equal(out, want)
    assert torch.equal(around[:, 72:], untouched)


def test_tiles_have_as_many_rows_as_experts_have() -> None:
    assert [tile_for(mean, 2, is_roomy=True).rows for mean in (0.1, 8, 9, 64, 65)] == [16, 16, 64, 64, 128]
    assert tile_for(500, 2, is_roomy=False).rows == 64
    assert tile_for(500, 4, is_roomy=True).rows == 16


def test_what_does_not_fit_is_refused() -> None:
    x, gate_up, down, chosen, shares, residual = given(3, 5, 2, 72, 40)
    ups, downs = few(gate_up, 8), few(down, 8)
    for tensors, told in (
        ((x, ups, few(down[:4], 8), chosen, shares, residual), "weights must fit x"),
        ((x, few(gate_up[:, :, :64], 8), downs, chosen, shares, residual), "weights must fit x"),
        ((x, ups, downs, chosen[:2], shares, residual), "for each row"),
        ((x, ups, downs, chosen, shares, residual[:2]), "residual and result"),
        ((x, ups, downs, chosen.t().contiguous().t(), shares, residual), "must be dense"),
    ):
        with pytest.raises(ValueError, match=told):
            multiply(*tensors)


@pytest.mark.parametrize("quant_type", ["a16w8", "a16w4"])
def test_a_model_of_experts_gives_what_its_layers_give_one_by_one(quant_type: str) -> None:
    together = in_groups(DEVICE, torch.float32, quant_type)
    for num_tokens in (1, 11):
        ours, apart = (logits(backend, num_tokens) for backend in (together, replace(together, make_experts=None)))
        assert error(ours, apart) < 1e-5


def logits(backend: Backend, num_tokens: int) -> Tensor:
    config = published_config("qwen3_moe", "tiny")
    config = replace(config, text=replace(config.text, vocab_size=1024))  # the head, in 8 bits, takes most of the time
    weights = RandomWeights(config, DEVICE, same_everywhere=True)
    model = LoadedModel(config, config.family.decoder(config, weights, backend), None, backend)
    with torch.inference_mode():
        return model.forward(text_batch(DEVICE, [num_tokens], [num_tokens]), allocate_kv(model, 2, BLOCK_SIZE))


@pytest.mark.parametrize("stored", ["with zeros", "around 8", "in part"])
def test_experts_have_4_bits_as_they_are_stored(stored: str) -> None:
    """In part: what is stored otherwise is rounded, and both stand side by side."""
    matrices: list[Matrix] = []
    want: list[Tensor] = []
    for i in range(3):
        numbers = torch.randint(0, 16, (256, 128), dtype=torch.uint8)
        scales = torch.rand(256, 1).bfloat16().float()
        zeros = torch.full((256, 1), 8, dtype=torch.uint8) if stored == "around 8" else torch.randint(
            0, 16, (256, 1), dtype=torch.uint8)  # fmt: skip
        nibbles = Nibbles(128, True, lambda found=(numbers, scales, zeros): found)  # type: ignore[misc]
        weight = (numbers.float() - zeros.float()) * scales
        is_stored = stored != "in part" or i != 1
        matrices.append(Matrix(str(i), 256, 128, lambda x=weight: x, nibbles=nibbles if is_stored else None))  # type: ignore[misc]
        want.append(weight if is_stored else grouped.expand(grouped.rounded(weight, 4), torch.float32))
    layer = in_groups(DEVICE, torch.float32, "a16w4").experts(torch.randn(3, 128), matrices, matrices, Routing(2, True))
    assert isinstance(layer, CudaExperts)
    found: GroupedWeight = layer.multiply.keywords["gate_up"]  # type: ignore[attr-defined]
    assert (found.shifts is None) == (stored == "around 8")
    assert error(grouped.expand(found, torch.float32), torch.cat(want)) < 1e-6
