"""Rotary positions: M-RoPE of the text model, two-dimensional ones of the ViT.

Tables hold one angle per pair of channels, [T, D / 2]; channel i is rotated with channel i + D / 2 (the half-split
form of RoPE, Su et al. 2021, that the published weights were trained with).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["inverse_frequencies", "mrope_cos_sin", "rope", "vision_cos_sin"]


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """float32 [dim / 2]: theta ** (-2 i / dim)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def mrope_cos_sin(
    positions: torch.Tensor, frequencies: torch.Tensor, sections: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """int [3, T] positions -> float32 [T, D / 2] cosines and sines.

    `frequencies` is float32 [D / 2]; its first `sections[0]` channels turn with the temporal axis, the next with the
    height and the rest with the width (Qwen2-VL, Wang et al. 2024).
    """
    parts = torch.split(frequencies, list(sections))
    angles = [axis.float()[:, None] * part for axis, part in zip(positions, parts, strict=True)]
    table = torch.cat(angles, dim=-1)
    return table.cos(), table.sin()


def vision_cos_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int [P, 2] rows and columns of patches -> float32 [P, D / 2] cosines and sines.

    `frequencies` is float32 [D / 4]; the first half of the table turns with the row, the second with the column.
    """
    table = (positions.float()[:, :, None] * frequencies).flatten(1)
    return table.cos(), table.sin()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate [T, H, D] in place by the tables [T, D / 2]; `x` may be a strided view. Computes in float32."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    half = x.shape[-1] // 2
    rotated_low, rotated_high = low * cos - high * sin, high * cos + low * sin
    x[..., :half] = rotated_low
    x[..., half:] = rotated_high
