"""The first layer of a ViT: uint8 patches [P, K] -> [P, N]. Which class computes it is `Backend.make_patches`."""

from __future__ import annotations

from typing import Protocol

import torch

from dashinfer_vlm.kernels import cpu_ops

__all__ = ["NativePatches", "Patches", "TorchPatches"]

WIDE_ROWS = 1024
"""Patches that are widened at a time: a large picture never stands in memory in four times its bytes."""


class Patches(Protocol):
    """uint8 [P, K] -> [P, N], float32 or the activations' type."""

    def __call__(self, patches: torch.Tensor) -> torch.Tensor: ...


class TorchPatches:
    """`patches W^T + bias` of a float32 weight [N, K] and bias [N], which are used as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight_t = weight.t()
        self.bias = bias

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(patches), len(self.bias), device=patches.device)
        for start in range(0, len(patches), WIDE_ROWS):
            rows = slice(start, start + WIDE_ROWS)
            torch.addmm(self.bias, patches[rows].float(), self.weight_t, out=out[rows])
        return out


class NativePatches:
    """The same by the native kernels, which take the bytes."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.packed = cpu_ops.pack_linear(weight)
        self.bias = bias

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        return cpu_ops.embed_patches(patches, self.packed, self.bias)
