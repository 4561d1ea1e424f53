"""All experts in one call are what their layers make one after the other."""

from __future__ import annotations

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.experts import NativeExperts
from tests.kernels.test_layer import HIDDEN, INNER, packed

pytestmark = pytest.mark.usefixtures("level")

COUNT = 5
Layers = list[tuple[cpu_ops.PackedWeight, cpu_ops.PackedWeight]]


def layers(kind: str) -> Layers:
    return [(packed(2 * INNER, HIDDEN, kind, gate_up=True), packed(HIDDEN, INNER, kind)) for _ in range(COUNT)]


def chosen_of(num_rows: int, count: int) -> torch.Tensor:
    """Expert 2 is nobody's."""
    return torch.stack([torch.randperm(4)[:count] for _ in range(num_rows)]).apply_(lambda i: i + (i >= 2))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("num_rows", "count"), [(1, 1), (1, 3), (4, 2), (37, 3)])
def test_each_row_gets_the_shares_of_its_experts(kind: str, num_rows: int, count: int) -> None:
    experts = layers(kind)
    x, out = torch.randn(num_rows, HIDDEN), torch.randn(num_rows, HIDDEN)
    chosen, shares = chosen_of(num_rows, count), torch.rand(num_rows, count)
    want = out.clone()
    for row in range(num_rows):
        for expert, share in zip(chosen[row], shares[row], strict=True):
            gate_up, down = experts[expert]
            inner = cpu_ops.linear(x[row : row + 1], gate_up, epilogue="silu_mul")
            want[row] += share * cpu_ops.linear(inner, down)[0]
    NativeExperts(experts).add_to(out, x, chosen, shares)
    exact = kind in ("float32", "int8", "int4")  # of bfloat16 some levels round several rows in another way
    torch.testing.assert_close(out, want, atol=1e-5 if exact else 2e-2, rtol=1e-5)


def test_no_rows_are_no_work() -> None:
    nothing = torch.empty(0, HIDDEN)
    NativeExperts(layers("float32")).add_to(nothing, nothing.clone(), torch.empty(0, 2).long(), torch.empty(0, 2))


def test_what_does_not_fit_is_refused() -> None:
    experts = layers("float32")
    x, chosen, shares = torch.randn(2, HIDDEN), torch.tensor([[0, 1], [2, 5]]), torch.rand(2, 2)
    native = NativeExperts(experts)
    with pytest.raises(ValueError, match="chosen: expected experts from 0 to 4"):
        native.add_to(torch.zeros_like(x), x, chosen, shares)
    with pytest.raises(ValueError, match="chosen"):
        native.add_to(torch.zeros_like(x), x, -chosen, shares)
    with pytest.raises(ValueError, match="shares"):
        native.add_to(torch.zeros_like(x), x, chosen.clamp(max=4), shares[:, :1])
    with pytest.raises(ValueError, match="out"):
        native.add_to(x, x, chosen.clamp(max=4), shares)
    with pytest.raises(ValueError, match="one at least"):
        NativeExperts([])
    with pytest.raises(ValueError, match="gate_ups: of one size"):
        NativeExperts([*experts, (packed(2 * INNER + 32, HIDDEN, "float32", gate_up=True), experts[0][1])])
    with pytest.raises(ValueError, match="downs: of one size"):
        NativeExperts([*experts, (experts[0][0], packed(HIDDEN + 1, INNER, "float32"))])
