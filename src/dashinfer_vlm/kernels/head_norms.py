"""Norms of single heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["HeadNorms"]


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each head of queries and keys, before they are rotated."""

    queries: Tensor
    """[D], of the activations' type, as `keys`."""
    keys: Tensor
    eps: float
