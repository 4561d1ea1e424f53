"""oneDNN's packed products, through functions that torch keeps private: the one place that knows their names.

`available` looks at each of them, so that a torch that has renamed one costs speed and a line in the log, not a start.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["available", "linear", "linear_add", "pack"]


@cache
def available() -> bool:
    """Whether this CPU has bfloat16 arithmetic that oneDNN uses; without it torch's 16-bit products crawl."""
    try:
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        ops = torch.ops.mkldnn
        _ = ops._reorder_linear_weight, ops._linear_pointwise.default, ops._linear_pointwise.binary
        return bool(has_units and ops._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 [N, K] in oneDNN's layout; always a copy."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """bfloat16 [T, K] times a packed weight: [T, N]."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def linear_add(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """`linear` plus `residual` [T, N], in a new tensor."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return y
