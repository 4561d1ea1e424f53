"""A mixture with a shared expert against that of `transformers`."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers.backend import choose_backend
from dashinfer_vlm.layers.experts import LoopedExperts, Routing, choose
from dashinfer_vlm.layers.linear import Matrix, NativeLinear

HIDDEN, INNER, COUNT, CHOSEN = 48, 40, 6, 2
ROUTING = Routing(CHOSEN, is_normalised=True, has_shared=True)


@pytest.fixture
def block() -> Qwen3_5MoeSparseMoeBlock:
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=HIDDEN,
        num_experts=COUNT,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=INNER,
    )
    made = Qwen3_5MoeSparseMoeBlock(config).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(std=0.3)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_expert_is_the_last_of_every_row(block: Qwen3_5MoeSparseMoeBlock, dtype: torch.dtype) -> None:
    """Its logit, however high, takes nothing from the shares of the others."""
    x = torch.randn(30, HIDDEN).to(dtype)
    logits, theirs, experts = block.to(dtype).gate(x)
    shared = block.shared_expert_gate(x)
    chosen, shares = choose(torch.cat((logits, shared), dim=1), ROUTING)
    assert shares.dtype == dtype
    assert torch.equal(chosen, torch.cat((experts, torch.full_like(experts[:, :1], COUNT)), dim=1))
    assert torch.equal(shares, torch.cat((theirs, shared.sigmoid()), dim=1))


@pytest.mark.parametrize("kind", ["native", "looped"])
@pytest.mark.parametrize("num_rows", [1, 30])
def test_rows_get_what_the_block_of_transformers_gives(
    block: Qwen3_5MoeSparseMoeBlock, kind: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "native" and not cpu_ops.available():
        pytest.skip(str(cpu_ops.why_unavailable()))
    monkeypatch.setattr(cpu_ops, "available", lambda: kind == "native")
    shared = block.shared_expert
    gate_ups = [*block.experts.gate_up_proj, torch.cat((shared.gate_proj.weight, shared.up_proj.weight))]
    downs = [*block.experts.down_proj, shared.down_proj.weight]
    router = torch.cat((block.gate.weight, block.shared_expert_gate.weight))
    backend = choose_backend(torch.device("cpu"), torch.float32)
    experts = backend.experts(router, list(map(matrix, gate_ups)), list(map(matrix, downs)), ROUTING)
    assert isinstance(experts, LoopedExperts) == (kind == "looped")
    assert isinstance(experts.router, NativeLinear) == (kind == "native")
    x, residual = torch.randn(num_rows, HIDDEN), torch.randn(num_rows, HIDDEN)
    expected = block(x[None])[0]
    torch.testing.assert_close(experts(x, residual=None), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(experts(x, residual=residual.clone()), expected + residual, atol=1e-4, rtol=1e-5)


def matrix(tensor: torch.Tensor) -> Matrix:
    return Matrix("weight", len(tensor), tensor.shape[1], lambda: tensor)
