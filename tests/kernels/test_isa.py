"""Instruction levels that this machine may lack: their sources run on emulated instructions (`make test-isa`)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops


def test_the_emulated_build_has_every_level(emulated: ModuleType) -> None:
    assert emulated.levels() == ["amx", "avx512_bf16", "avx512", "avx2", "generic"]


@pytest.mark.parametrize(("before", "after"), [("avx2", "amx"), ("avx512", "generic")])
def test_weights_in_the_layout_of_another_level_are_refused(emulated: ModuleType, before: str, after: str) -> None:
    x, weight = torch.randn(3, 64), torch.randn(20, 64)
    emulated.set_isa(before)
    packed = [
        cpu_ops.pack_linear(weight.bfloat16()),
        cpu_ops.pack_linear_int8(weight),
        cpu_ops.pack_linear_int4(weight, 32),
    ]
    plain = cpu_ops.pack_linear(weight)
    want = cpu_ops.linear(x, plain)
    emulated.set_isa(after)
    for other in packed:
        with pytest.raises(ValueError, match="packed for another instruction level"):
            cpu_ops.linear(x, other)
    torch.testing.assert_close(cpu_ops.linear(x, plain), want)


def test_levels_of_one_layout_share_their_weights(emulated: ModuleType) -> None:
    x, weight = torch.randn(40, 300), torch.randn(50, 300)
    emulated.set_isa("avx512")
    for packed, error in (
        (cpu_ops.pack_linear(weight.bfloat16()), 0.2),
        (cpu_ops.pack_linear_int8(weight), 0.0),
        (cpu_ops.pack_linear_int8(weight, 128), 0.2),
        (cpu_ops.pack_linear_int4(weight, 128), 0.6),  # tiles multiply bfloat16, the others 8 bits in blocks of 32
    ):
        emulated.set_isa("avx512")
        want = cpu_ops.linear(x, packed)
        for level in ("avx512_bf16", "amx"):
            emulated.set_isa(level)
            torch.testing.assert_close(cpu_ops.linear(x, packed), want, rtol=0, atol=error)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("name", ["avx512_bf16", "amx"])
def test_bfloat16_arithmetic_treats_denormal_numbers_as_zeros(emulated: ModuleType, name: str, rows: int) -> None:
    emulated.set_isa(name)
    denormal = torch.full((4, 32), 1e-39).bfloat16()
    assert (denormal != 0).all()
    assert (cpu_ops.linear(torch.full((rows, 32), 1e9), cpu_ops.pack_linear(denormal)) == 0).all()


def test_products_of_many_blocks_and_pieces_are_whole(emulated: ModuleType) -> None:
    x, weight = torch.randn(801, 1100), torch.randn(613, 1100).bfloat16()
    want = x.bfloat16().double() @ weight.double().T
    for name in ("amx", "avx512_bf16"):
        emulated.set_isa(name)
        got = cpu_ops.linear(x, cpu_ops.pack_linear(weight))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3)
        for packed in (cpu_ops.pack_linear_int8(weight, 128), cpu_ops.pack_linear_int8(weight)):
            assert (cpu_ops.linear(x, packed).double() - want).abs().max() < 3
