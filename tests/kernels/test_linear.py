"""Products with packed weights against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import Epilogue

pytestmark = pytest.mark.usefixtures("level")

ROWS = [1, 2, 3, 5, 6, 7, 8, 13, 16, 31, 64, 193, 400]
DTYPES = [torch.bfloat16, torch.float32]


def as_multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """x in float64, as the level in use multiplies it with `weight`."""
    rounds = weight.dtype == torch.bfloat16 and cpu_ops.multiplies_bfloat16()
    return (x.bfloat16() if rounds else x).double()


def assert_close(got: Tensor, want: Tensor, depth: int) -> None:
    """Sums of `depth` products of order one, taken in float32."""
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * depth**0.5 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_the_product_for_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(rows, 300), torch.randn(70, 300).to(dtype), torch.randn(70)
    got = cpu_ops.linear(x, cpu_ops.pack_linear(weight), bias)
    assert_close(got, as_multiplied(x, weight) @ weight.double().T + bias.double(), 300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (15, 3), (16, 16), (17, 257), (600, 5), (33, 1000)])
@pytest.mark.parametrize("rows", [1, 9, 20])
def test_linear_is_the_product_for_any_weight_shape(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth).to(dtype)
    got = cpu_ops.linear(x, cpu_ops.pack_linear(weight))
    assert_close(got, as_multiplied(x, weight) @ weight.double().T, depth)


def test_linear_gives_the_same_bits_with_any_number_of_threads(num_threads: int) -> None:
    x, weight = torch.randn(50, 64), torch.randn(700, 64)
    packed = cpu_ops.pack_linear(weight)
    got = cpu_ops.linear(x, packed)
    cpu_ops.set_num_threads(1)
    assert torch.equal(got, cpu_ops.linear(x, packed)), num_threads


def test_linear_reads_strided_rows_and_writes_strided_rows() -> None:
    x = torch.randn(11, 100)[::2, 3:80]
    weight = torch.randn(80, 77).bfloat16()
    packed = cpu_ops.pack_linear(weight.t().contiguous().t())
    canvas = torch.full((6, 100), 7.0)
    returned = cpu_ops.linear(x, packed, out=canvas[:, 9:89])
    assert_close(canvas[:, 9:89], as_multiplied(x, weight) @ weight.double().T, 77)
    assert returned.data_ptr() == canvas[:, 9:].data_ptr()
    assert (canvas[:, :9] == 7).all()
    assert (canvas[:, 89:] == 7).all()


FINISH: dict[Epilogue, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns", [16, 37])
@pytest.mark.parametrize("epilogue", FINISH)
def test_epilogues_apply_to_the_sum_with_bias(epilogue: Epilogue, columns: int, with_bias: bool) -> None:
    x, weight = torch.randn(7, 50), torch.randn(columns, 50)
    bias = torch.randn(columns) if with_bias else None
    want = FINISH[epilogue](F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    assert_close(cpu_ops.linear(x, cpu_ops.pack_linear(weight), bias, epilogue=epilogue), want, 50)


@pytest.mark.parametrize("in_place", [False, True])
def test_residual_is_added_and_may_be_the_output(in_place: bool) -> None:
    x, weight, residual = torch.randn(9, 50), torch.randn(21, 50), torch.randn(9, 21)
    want = x.double() @ weight.double().T + residual.double()
    before = residual.clone()
    out = residual if in_place else None
    got = cpu_ops.linear(x, cpu_ops.pack_linear(weight), epilogue="residual", residual=residual, out=out)
    assert_close(got, want, 50)
    assert torch.equal(residual, got if in_place else before)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inner", [8, 13, 40])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_silu_mul_multiplies_gate_and_up_of_one_weight(rows: int, inner: int, with_bias: bool) -> None:
    x, weight = torch.randn(rows, 50), torch.randn(2 * inner, 50).bfloat16()
    bias = torch.randn(2 * inner) if with_bias else None
    product = F.linear(as_multiplied(x, weight), weight.double(), None if bias is None else bias.double())
    gate, up = product.chunk(2, dim=-1)
    packed = cpu_ops.pack_linear(weight, gate_up=True)
    assert packed.num_columns == inner
    assert_close(cpu_ops.linear(x, packed, bias, epilogue="silu_mul"), F.silu(gate) * up, 50)


def test_extreme_sums_saturate_instead_of_turning_into_nan() -> None:
    x, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    plain, gated = cpu_ops.pack_linear(weight), cpu_ops.pack_linear(weight, gate_up=True)
    epilogues: list[Epilogue] = ["gelu", "gelu_tanh", "quick_gelu"]
    for epilogue in epilogues:
        torch.testing.assert_close(cpu_ops.linear(x, plain, epilogue=epilogue), torch.tensor([[1e4, 0.0]]))
    torch.testing.assert_close(cpu_ops.linear(-x, gated, epilogue="silu_mul"), torch.tensor([[0.0]]))


def test_no_rows_give_no_rows() -> None:
    assert cpu_ops.linear(torch.empty(0, 8), cpu_ops.pack_linear(torch.randn(5, 8))).shape == (0, 5)


def test_packed_bfloat16_takes_two_bytes_per_parameter() -> None:
    assert cpu_ops.pack_linear(torch.zeros(64, 96, dtype=torch.bfloat16)).num_bytes == 2 * 64 * 96


def test_linear_names_what_is_wrong() -> None:
    packed, gated = cpu_ops.pack_linear(torch.randn(6, 8)), cpu_ops.pack_linear(torch.randn(6, 8), gate_up=True)
    x = torch.randn(2, 8)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("x: dtype", lambda: cpu_ops.linear(x.double(), packed)),
        ("x: expected float32", lambda: cpu_ops.linear(x.bfloat16(), packed)),
        (r"x: expected shape \[2, 8\]", lambda: cpu_ops.linear(x[:, :7], packed)),
        ("x: expected the axes", lambda: cpu_ops.linear(torch.randn(2, 16)[:, ::2], packed)),
        ("x: expected float32 with 2 axes", lambda: cpu_ops.linear(x[None], packed, out=torch.empty(2, 6))),
        (r"bias: expected shape \[6\]", lambda: cpu_ops.linear(x, packed, torch.zeros(5))),
        (r"out: expected shape \[2, 6\]", lambda: cpu_ops.linear(x, packed, out=torch.empty(2, 5))),
        ("out must not share memory with x", lambda: cpu_ops.linear(x, packed, out=x[:, :6])),
        ("residual: needed", lambda: cpu_ops.linear(x, packed, epilogue="residual")),
        ("residual: needed", lambda: cpu_ops.linear(x, packed, residual=torch.zeros(2, 6))),
        ("silu_mul belongs", lambda: cpu_ops.linear(x, packed, epilogue="silu_mul")),
        ("silu_mul belongs", lambda: cpu_ops.linear(x, gated)),
        ("weight: expected bfloat16 or float32", lambda: cpu_ops.pack_linear(torch.zeros(6, 8, dtype=torch.int8))),
        ("even number of rows", lambda: cpu_ops.pack_linear(torch.zeros(5, 8), gate_up=True)),
        ("weight: expected", lambda: cpu_ops.pack_linear(torch.zeros(0, 8))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
