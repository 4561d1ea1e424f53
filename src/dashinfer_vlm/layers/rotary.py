"""Rotary positions: M-RoPE of the text model, two-dimensional ones of the ViT.

Tables hold one angle per pair of channels, [T, D / 2]; channel i is rotated with channel i + D / 2 (the half-split
form of RoPE, Su et al. 2021, that the published weights were trained with).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = [
    "axes_of_channels",
    "inverse_frequencies",
    "mrope_cos_sin",
    "rope",
    "vision_cos_sin",
    "yarn_frequencies",
]


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """float32 [dim / 2]: theta ** (-2 i / dim)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def yarn_frequencies(
    frequencies: torch.Tensor, theta: float, factor: float, original_length: int, betas: tuple[float, float]
) -> torch.Tensor:
    """float32 [dim / 2] of `inverse_frequencies`, stretched for contexts `factor` times `original_length`.

    Channels that turn more than `betas[0]` times in the original context keep their frequency, those that turn less
    than `betas[1]` times get `1 / factor` of it, and between them it is interpolated (YaRN, Peng et al. 2023).
    """
    half = len(frequencies)

    def channel(num_turns: float) -> float:
        return half * math.log(original_length / (num_turns * 2 * math.pi)) / math.log(theta)

    low, high = max(math.floor(channel(betas[0])), 0), min(math.ceil(channel(betas[1])), 2 * half - 1)
    channels = torch.arange(half, dtype=torch.float32, device=frequencies.device)
    stretched = ((channels - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / factor * stretched + frequencies * (1 - stretched)


def axes_of_channels(sections: Sequence[int], device: torch.device, *, interleaved: bool = False) -> torch.Tensor:
    """int64 [D / 2]: the axis that each pair of channels turns with; `sections` says how many pairs each axis has.

    Temporal ones come first, then height, then width (Qwen2-VL, Wang et al. 2024). Interleaved, they take turns from
    the fastest channel on, until height and width have theirs; the rest is temporal (Qwen3-VL, Bai et al. 2025).
    """
    if not interleaved:
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
        return torch.tensor(axes, device=device)
    table = torch.zeros(sum(sections), dtype=torch.int64, device=device)
    for axis in (1, 2):
        table[axis : 3 * sections[axis] : 3] = axis
    return table


def mrope_cos_sin(
    positions: torch.Tensor, frequencies: torch.Tensor, axes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """int [3, T] positions -> float32 [T, D / 2] cosines and sines.

    Channel i turns with frequency `frequencies[i]` (float32 [D / 2]) and axis `axes[i]` (int64 [D / 2]).
    """
    table = positions.t().float()[:, axes] * frequencies
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
