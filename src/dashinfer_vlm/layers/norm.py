"""Normalisation over the last axis. Statistics are taken in float32 whatever the activations are."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, shift: torch.Tensor | None = None) -> torch.Tensor:
    """[T, C] -> [T, C] of x's dtype; `weight` [C] (RMSNorm, Zhang and Sennrich 2019). `shift`, float32 [C], is added to
    x first."""
    wide = (x if shift is None else x + shift).float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, C] -> [T, C] of x's dtype; `weight` and `bias` [C] (Ba, Kiros and Hinton 2016). `shift`, float32 [C], is
    added to x first."""
    if shift is not None:
        wide = x + shift
        return F.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
