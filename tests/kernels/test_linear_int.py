"""Products with 8-bit and 4-bit weights, against float64 products of the same rounded numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels import cpu_ops

pytestmark = pytest.mark.usefixtures("level")

ROWS = [1, 2, 5, 6, 7, 12, 13, 64, 200]
SHAPES = [(70, 300), (16, 32), (33, 1030), (5, 3), (1, 1), (40, 513)]


def weight_to_8_bits(weight: Tensor, group_size: int = 0) -> Tensor:
    rows, depth = weight.shape
    group_size = group_size or depth
    groups = F.pad(weight.float(), (0, -depth % group_size)).view(rows, -1, group_size)
    scale = (groups.abs().amax(2, keepdim=True) / 127).bfloat16().float()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    rounded = (groups * inverse).round().clamp(-127, 127)
    return (rounded.double() * scale.double()).view(rows, -1)[:, :depth]


def weight_to_4_bits(weight: Tensor, group_size: int) -> Tensor:
    rows, depth = weight.shape
    groups = F.pad(weight.float(), (0, -depth % group_size)).view(rows, -1, group_size)
    top = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = (top / -8).bfloat16().float()
    inverse = torch.where(scale != 0, 1 / scale, 0)
    return ((groups * inverse).round().clamp(-8, 7).double() * scale.double()).view(rows, -1)[:, :depth]


def activations_to_8_bits(x: Tensor, block_size: int = 0) -> Tensor:
    rows, depth = x.shape
    block_size = block_size or depth
    blocks = F.pad(x, (0, -depth % block_size)).view(rows, -1, block_size)
    top = blocks.abs().amax(2, keepdim=True)
    inverse = torch.where(top > 0, 127 / top, 0)
    rounded = (blocks * inverse).round().double() * (top / 127).double()
    return rounded.view(rows, -1)[:, :depth]


def seen_by_4_bits(x: Tensor) -> Tensor:
    """The activations as products with 4-bit weights take them: in blocks of 8 bits where dot products are of bytes."""
    by_bytes = cpu_ops.isa().startswith("avx512") or (cpu_ops.isa() == "amx" and len(x) < 16)
    return activations_to_8_bits(x, 32) if by_bytes else x.double()


def error_in_groups(rows: int) -> float:
    """What products with weights in groups may lose: tiles multiply bfloat16."""
    return 1e-2 if rows >= 16 and cpu_ops.isa() == "amx" else 1e-4


def assert_relative(got: Tensor, want: Tensor, error: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=0, atol=error * float(want.abs().max()) + 1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_8_bits_sum_exactly_what_was_rounded(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth).to(dtype), torch.randn(columns)
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int8(weight), bias)
    want = activations_to_8_bits(x) @ weight_to_8_bits(weight).T + bias.double()
    assert_relative(got, want, 3e-7)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_4_bits_are_the_product_with_the_rounded_weight(rows: int, columns: int, depth: int, group_size: int) -> None:
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth).bfloat16(), torch.randn(columns)
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int4(weight, group_size), bias)
    want = seen_by_4_bits(x) @ weight_to_4_bits(weight, group_size).T + bias.double()
    assert_relative(got, want, error_in_groups(rows))


def stored(columns: int, depth: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of 4 bits, scales and zeros."""
    groups = -(-depth // group_size)
    zeros = torch.randint(16, (columns, groups), dtype=torch.uint8)
    return torch.randint(16, (columns, depth), dtype=torch.uint8), 0.1 * torch.randn(columns, groups), zeros


def wide(numbers: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """What they stand for, with scales as they are kept; float64."""
    group = torch.arange(numbers.shape[1]) // group_size
    less = 8 if zeros is None else zeros.double()[:, group]
    return (numbers.double() - less) * scales.bfloat16().double()[:, group]


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_4_bits_are_taken_as_they_are_stored(rows: int, columns: int, depth: int, group_size: int) -> None:
    x, bias = torch.randn(rows, depth), torch.randn(columns)
    numbers, scales, zeros = stored(columns, depth, group_size)
    for of_groups in (zeros, None):
        got = cpu_ops.linear(x, cpu_ops.pack_stored_int4(numbers, scales, of_groups, group_size), bias)
        want = seen_by_4_bits(x) @ wide(numbers, scales, of_groups, group_size).T + bias.double()
        assert_relative(got, want, error_in_groups(rows))


def test_numbers_that_were_rounded_before_are_packed_alike() -> None:
    weight = torch.randn(40, 300)
    groups = F.pad(weight, (0, 84)).view(40, 3, 128)
    top = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (top / -8).bfloat16().float()
    numbers = ((groups / scales).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)[:, :300].contiguous()
    for gate_up in (False, True):
        got = cpu_ops.pack_stored_int4(numbers, scales[..., 0].contiguous(), None, gate_up=gate_up)
        want = cpu_ops.pack_linear_int4(weight, gate_up=gate_up)
        assert bytes(got.panels) == bytes(want.panels)


@pytest.mark.parametrize("rows", [1, 40])
def test_rounding_activations_adds_little_to_the_error_of_4_bit_weights(rows: int) -> None:
    x, weight = torch.randn(rows, 1536), torch.randn(96, 1536)
    x[:, 7] *= 100  # an outlier, as trained models have them
    exact = x.double() @ weight.double().T
    from_weights = (x.double() @ weight_to_4_bits(weight, 128).T - exact).norm()
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int4(weight)).double()
    assert (got - exact).norm() < 1.03 * from_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_8_bits_in_groups_are_the_product_with_the_rounded_weight(
    rows: int, columns: int, depth: int, dtype: torch.dtype
) -> None:
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth).to(dtype), torch.randn(columns)
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int8(weight, 128), bias)
    assert_relative(got, x.double() @ weight_to_8_bits(weight, 128).T + bias.double(), error_in_groups(rows))


def test_an_outlier_does_not_coarsen_the_other_groups() -> None:
    x, weight = torch.randn(3, 256), torch.randn(20, 256)
    x[:, 5] = 1e6
    weight[:, :128] = 0
    for packed, seen in (
        (cpu_ops.pack_linear_int4(weight), weight_to_4_bits(weight, 128)),
        (cpu_ops.pack_linear_int8(weight, 128), weight_to_8_bits(weight, 128)),
    ):
        x_seen = seen_by_4_bits(x) if packed.shape.type == "int4" else x.double()
        assert_relative(cpu_ops.linear(x, packed), x_seen @ seen.T, 1e-4)


def test_the_largest_sums_do_not_overflow() -> None:
    x = torch.ones(7, 1 << 16)
    weight = torch.full((3, 1 << 16), -1.0)
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int8(weight))
    assert_relative(got, activations_to_8_bits(x) @ weight_to_8_bits(weight).T, 1e-6)
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int8(weight, 128))
    assert_relative(got, x.double() @ weight_to_8_bits(weight, 128).T, 1e-4)
    got = cpu_ops.linear(x, cpu_ops.pack_linear_int4(weight))
    assert_relative(got, seen_by_4_bits(x) @ weight_to_4_bits(weight, 128).T, 1e-4)


PACKS = [cpu_ops.pack_linear_int8, partial(cpu_ops.pack_linear_int8, group_size=128), cpu_ops.pack_linear_int4]
PACK_NAMES = ["int8", "int8 in groups", "int4"]


@pytest.mark.parametrize("pack", PACKS, ids=PACK_NAMES)
def test_zeros_give_zeros(pack: Callable[[Tensor], cpu_ops.PackedWeight]) -> None:
    zeros, values = torch.zeros(5, 40), torch.randn(5, 40)
    assert (cpu_ops.linear(values, pack(zeros)) == 0).all()
    assert (cpu_ops.linear(zeros, pack(values)) == 0).all()


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pack", PACKS, ids=PACK_NAMES)
def test_what_is_no_number_spoils_its_row_alone(
    pack: Callable[[Tensor], cpu_ops.PackedWeight], bad: float, rows: int
) -> None:
    x, packed = torch.randn(rows, 300), pack(torch.randn(20, 300))
    want = cpu_ops.linear(x, packed)
    x[rows // 2, 130] = bad
    got = cpu_ops.linear(x, packed)
    assert not got[rows // 2].isfinite().any()
    want[rows // 2] = got[rows // 2]
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("pack", PACKS, ids=PACK_NAMES)
def test_a_weight_that_is_no_number_gives_none(pack: Callable[[Tensor], cpu_ops.PackedWeight]) -> None:
    weight = torch.randn(20, 300)
    weight[3, 130] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all bits are set
    got = cpu_ops.linear(torch.ones(5, 300), pack(weight))
    assert got.isnan().nonzero().tolist() == [[row, 3] for row in range(5)]


@pytest.mark.parametrize("inner", [8, 13, 40])
@pytest.mark.parametrize("rows", [1, 9])
def test_gate_and_up_are_multiplied_in_8_and_4_bits(rows: int, inner: int) -> None:
    x, weight, bias = torch.randn(rows, 96), torch.randn(2 * inner, 96), torch.randn(2 * inner)
    as_stored = stored(2 * inner, 96, 32)
    for packed, x_seen, seen in (
        (cpu_ops.pack_linear_int8(weight, gate_up=True), activations_to_8_bits(x), weight_to_8_bits(weight)),
        (cpu_ops.pack_linear_int8(weight, 128, gate_up=True), x.double(), weight_to_8_bits(weight, 128)),
        (cpu_ops.pack_linear_int4(weight, 32, gate_up=True), seen_by_4_bits(x), weight_to_4_bits(weight, 32)),
        (cpu_ops.pack_stored_int4(*as_stored, 32, gate_up=True), seen_by_4_bits(x), wide(*as_stored, 32)),
    ):
        gate, up = (x_seen @ seen.T + bias.double()).chunk(2, dim=-1)
        assert_relative(cpu_ops.linear(x, packed, bias, epilogue="silu_mul"), F.silu(gate) * up, 4e-4)


def test_integer_products_give_the_same_bits_with_any_number_of_threads(num_threads: int) -> None:
    x, weight = torch.randn(500, 96), torch.randn(300, 96)
    for packed in (
        cpu_ops.pack_linear_int8(weight),
        cpu_ops.pack_linear_int8(weight, 128),
        cpu_ops.pack_linear_int4(weight),
    ):
        got = cpu_ops.linear(x, packed)
        threads_before = cpu_ops.num_threads()
        cpu_ops.set_num_threads(1)
        assert torch.equal(got, cpu_ops.linear(x, packed)), num_threads
        cpu_ops.set_num_threads(threads_before)


def test_integer_weights_take_one_and_half_a_byte_per_parameter_and_their_scales() -> None:
    weight = torch.randn(64, 1024)
    assert cpu_ops.pack_linear_int8(weight).num_bytes - 64 * 1024 in (64 * 2, 64 * 4)  # rows of 64 bytes
    assert cpu_ops.pack_linear_int8(weight, 128).num_bytes == 64 * 1024 + 64 * 8 * 2
    assert cpu_ops.pack_linear_int4(weight).num_bytes == 64 * 1024 // 2 + 64 * 8 * 2
    assert cpu_ops.pack_linear_int4(weight, 32).num_bytes == 64 * 1024 // 2 + 64 * 32 * 2
    assert cpu_ops.pack_stored_int4(*stored(64, 1024, 128)).num_bytes == 64 * 1024 // 2 + 64 * 8 * 4


def test_packing_names_what_is_wrong() -> None:
    weight, numbers = torch.randn(6, 8), torch.ones(6, 8, dtype=torch.uint8)
    cases: list[tuple[str, Callable[[], object]]] = [
        (
            "group_size: must be 32 or 128 for 4 bits, 128 or 0 for 8 bits, got 64",
            lambda: cpu_ops.pack_linear_int4(weight, 64),
        ),
        ("group_size: .* got 32", lambda: cpu_ops.pack_linear_int8(weight, 32)),
        ("weight: expected bfloat16 or float32", lambda: cpu_ops.pack_linear_int8(weight.long())),
        (r"K up to 2\*\*16", lambda: cpu_ops.pack_linear_int8(torch.zeros(1, (1 << 16) + 1))),
        ("even number of rows", lambda: cpu_ops.pack_linear_int4(weight[:5], gate_up=True)),
        (r"scales: expected .*\[6, 1\]", lambda: cpu_ops.pack_stored_int4(numbers, torch.ones(6, 2), None)),
        ("zeros: expected uint8", lambda: cpu_ops.pack_stored_int4(numbers, torch.ones(6, 1), torch.ones(6, 1))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
