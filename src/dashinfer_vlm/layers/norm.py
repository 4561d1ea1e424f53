"""Normalisation over the last axis. Statistics are taken in float32 whatever the activations are."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, C] -> [T, C] of x's dtype; `weight` [C] (RMSNorm, Zhang and Sennrich 2019)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """[T, C] -> [T, C] of x's dtype; `weight` and `bias` [C] (Ba, Kiros and Hinton 2016)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
