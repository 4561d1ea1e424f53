"""The product of byte patches against float64, and its reference beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers.patches import WIDE_ROWS, NativePatches, TorchPatches

SIZES = [(1, 1176, 1280), (385, 1176, 40), (800, 13, 33), (3, 1, 1), (0, 8, 16)]


def layer(width: int, depth: int) -> tuple[Tensor, Tensor]:
    return torch.randn(width, depth) / 255, torch.randn(width)


def byte_patches(rows: int, depth: int) -> Tensor:
    return torch.randint(0, 256, (rows, depth), dtype=torch.uint8)


def exact(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return patches.double() @ weight.double().t() + bias.double()


@pytest.mark.parametrize(("rows", "depth", "width"), SIZES)
def test_patches_are_multiplied_exactly_but_for_the_last_bits(
    num_threads: int, rows: int, depth: int, width: int
) -> None:
    weight, bias = layer(width, depth)
    patches = byte_patches(rows, depth)
    got = NativePatches(weight, bias)(patches)
    torch.testing.assert_close(got.double(), exact(patches, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("level")
def test_strided_patches_and_a_strided_result_are_taken_as_they_are() -> None:
    weight, bias = layer(20, 50)
    patches, out = byte_patches(70, 61)[:, 3:53], torch.zeros(70, 23)
    cpu_ops.embed_patches(patches, cpu_ops.pack_linear(weight), bias, out[:, 1:21])
    torch.testing.assert_close(out[:, 1:21].double(), exact(patches, weight, bias), rtol=1e-5, atol=1e-4)
    assert not out[:, 0].any()
    assert not out[:, 21:].any()


def test_the_reference_is_the_same_product_piece_by_piece() -> None:
    weight, bias = layer(24, 30)
    patches = byte_patches(2 * WIDE_ROWS + 7, 30)
    got = TorchPatches(weight, bias)(patches)
    torch.testing.assert_close(got.double(), exact(patches, weight, bias), rtol=1e-5, atol=1e-4)
    assert TorchPatches(weight, bias)(patches[:0]).shape == (0, 24)


@pytest.mark.usefixtures("level")
def test_what_is_no_patch_and_no_weight_for_patches_is_named() -> None:
    weight, bias = layer(16, 32)
    packed, patches = cpu_ops.pack_linear(weight), byte_patches(4, 32)
    with pytest.raises(ValueError, match="patches: expected uint8"):
        cpu_ops.embed_patches(patches.float(), packed, bias)
    with pytest.raises(ValueError, match=r"patches: expected shape \[4, 32\]"):
        cpu_ops.embed_patches(patches[:, 1:], packed, bias)
    with pytest.raises(ValueError, match="packed by pack_linear, without gate_up"):
        cpu_ops.embed_patches(patches, cpu_ops.pack_linear_int8(weight), bias)
