"""What a ViT begins with: patches embedded, and learnt positions from a square table that is stretched over each
grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.memory import sent
from dashinfer_vlm.models.config import VisionConfig
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.request import Grid

__all__ = ["PatchEmbedding", "PositionTable", "Taps"]


class PatchEmbedding:
    """uint8 patches [P, patch_dim] -> [P, width], normalisation included.

    W ((v * rescale - mean) / std) = (W * rescale / std) v - W (mean / std): the constants go into weight and bias, in
    float64, and the product is taken in float32 because raw pixel values need more bits than bfloat16 has.
    """

    def __init__(self, c: VisionConfig, weights: Weights, backend: Backend, *, has_bias: bool = False) -> None:
        processor = c.processor
        shape = (c.width, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        weight = weights.take("visual.patch_embed.proj.weight", *shape).double().flatten(2)
        constants = (processor.image_mean, processor.image_std)
        mean, std = (torch.tensor(x, dtype=torch.float64, device=weight.device) for x in constants)
        bias = -(weight * (mean / std)[:, None]).sum(dim=(1, 2))
        if has_bias:
            bias += weights.take("visual.patch_embed.proj.bias", c.width).double()
        folded = (weight * (processor.rescale_factor / std)[:, None]).flatten(1)
        self.flops_per_patch = 2 * folded.numel()
        self.project = backend.make_patches(folded.float().to(backend.device), bias.float().to(backend.device))
        self.dtype = backend.activation_dtype

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        return self.project(patches).to(self.dtype)


class Taps(NamedTuple):
    """Four neighbours in the table for each packed patch."""

    indices: torch.Tensor
    """int64 [P, 4]."""
    weights: torch.Tensor
    """float32 [P, 4], 1 together."""


class PositionTable:
    """Bilinear interpolation of `side` by `side` learnt vectors; the corners of a grid are those of the table. Takes
    `{name}.weight`. Source: Qwen3VLVisionModel of `transformers`."""

    def __init__(self, name: str, side: int, width: int, weights: Weights, backend: Backend) -> None:
        self.side = side
        self.table = backend.vector(weights.take(f"{name}.weight", side * side, width))

    def taps(self, places: Sequence[torch.Tensor], grids: Sequence[Grid]) -> Taps:
        """Of the packed patches of several items; `places` are the int64 [P_i, 2] rows and columns of each."""
        found = [self._taps(place, rows, columns) for place, (_, rows, columns) in zip(places, grids, strict=True)]
        indices, weights = (sent(torch.cat(parts), self.table.device) for parts in zip(*found, strict=True))
        return Taps(indices, weights)

    def add(self, x: torch.Tensor, taps: Taps, rows: slice) -> None:
        """Add the positions of the patches `rows` to x, which holds these patches alone."""
        for k in range(4):
            x += self.table[taps.indices[rows, k]] * taps.weights[rows, k, None].to(x.dtype)

    def _taps(self, place: torch.Tensor, rows: int, columns: int) -> Taps:
        (top, bottom, down), (left, right, across) = self._axis(place[:, 0], rows), self._axis(place[:, 1], columns)
        corners = [(y, x) for y in (top, bottom) for x in (left, right)]
        shares = [v * h for v in (1 - down, down) for h in (1 - across, across)]
        return Taps(torch.stack([y * self.side + x for y, x in corners], 1), torch.stack(shares, 1))

    def _axis(self, index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lower and upper neighbour, and how far a patch lies towards the upper one."""
        exact = index.float() * (self.side - 1) / max(size - 1, 1)
        lower = exact.floor()
        return lower.long(), (lower.long() + 1).clamp(max=self.side - 1), exact - lower
