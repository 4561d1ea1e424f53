"""Norms of a ViT's residual stream."""

from __future__ import annotations

from typing import Protocol

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.models.weights import Weights

__all__ = ["LayerNorm", "Norm", "RmsNorm"]

NORM_EPS = 1e-6  # a constant of the published models, in no configuration file


class Norm(Protocol):
    """[P, width] -> [P, width]."""

    shift: torch.Tensor | None
    """float32 [width], added to the rows first: the biases that a stream goes without (`Backend.leaves_out_biases`)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class LayerNorm:
    """Takes `{name}.weight` and `{name}.bias`."""

    def __init__(self, name: str, width: int, weights: Weights, backend: Backend) -> None:
        self.ops = backend.ops
        self.weight = backend.vector(weights.take(f"{name}.weight", width))
        self.bias = backend.vector(weights.take(f"{name}.bias", width))
        self.shift: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, NORM_EPS, shift=self.shift)


class RmsNorm:
    """Takes `{name}.weight`."""

    def __init__(self, name: str, width: int, weights: Weights, backend: Backend) -> None:
        self.ops = backend.ops
        self.weight = backend.vector(weights.take(f"{name}.weight", width))
        self.shift: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, NORM_EPS, shift=self.shift)
