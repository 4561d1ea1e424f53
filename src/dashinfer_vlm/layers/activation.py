"""Activation functions. `silu_mul` works on the joined output of the gate and up projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

__all__ = ["EPILOGUES", "Epilogue", "gelu", "gelu_tanh", "quick_gelu", "sigmoid_mul", "silu_mul"]

Epilogue = Literal["none", "silu_mul", "quick_gelu", "gelu", "gelu_tanh"]
"""What a linear layer does to its product before it adds the residual."""


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 N] of gates, then ups -> [T, N]: silu(gate) * up (SwiGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def sigmoid_mul(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gates), of one shape, in x's memory."""
    return x.mul_(gates.sigmoid())


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), of any shape (Hendrycks and Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact, erf-based GELU, of any shape."""
    return F.gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU approximated by tanh, of any shape (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def _none(x: torch.Tensor) -> torch.Tensor:
    return x


EPILOGUES: dict[Epilogue, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": _none,
    "silu_mul": silu_mul,
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
