"""Linear layers in 8-bit floats (e4m3): weights rounded once, activations row by row, sums in float32.

A scale belongs to a row of the weight, or as in published checkpoints to a block of 128 x 128; then activations have
one for 128 columns, too (DeepSeek-V3, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue
from dashinfer_vlm.layers.linear import Floats

__all__ = ["BLOCK", "REFERENCE", "Fp8Linear", "Fp8Ops", "block_product", "quantise", "rounded"]

BLOCK = 128
TOP = 448.0
SMALLEST_TOP = 1e-12
"""Of a row that is zero."""


def quantise(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """e4m3 [T, K] and float32 [T, K / group rounded up], whose products are about x; one scale per row without
    `group`."""
    num_rows, depth = x.shape
    width = group or depth
    groups = F.pad(x.float(), (0, -depth % width)).view(num_rows, -(-depth // width), width)
    scales = groups.abs().amax(-1).clamp(min=SMALLEST_TOP) / TOP
    numbers = (groups / scales[..., None]).clamp(-TOP, TOP).flatten(1)[:, :depth]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scales


def block_product(x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, N] of `dtype`: e4m3 [T, K] with a scale per 128 columns times e4m3 [N, K] with one per block, transposed."""
    wide = x.float() * scales.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    per_number = weight_scales.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)
    return (wide @ (weight.float() * per_number[:, : weight.shape[1]]).t()).to(dtype)


@dataclass(frozen=True, slots=True)
class Fp8Ops:
    """The functions that have more than one implementation."""

    quantise: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    block_product: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    epilogues: Mapping[Epilogue, Callable[[Tensor], Tensor]]


REFERENCE = Fp8Ops(quantise, block_product, EPILOGUES)


def rounded(weight: Tensor, ops: Fp8Ops) -> Floats:
    """A weight [N, K] of any type with a scale per row, on its device."""
    return Floats(*ops.quantise(weight, 0), is_in_blocks=False)


class Fp8Linear:
    """See `layers.linear.Linear`. x is bfloat16 on a card, which torch's product asks for."""

    def __init__(self, weight: Floats, bias: Tensor | None, epilogue: Epilogue, ops: Fp8Ops) -> None:
        self.weight = weight
        self.bias = bias
        self.epilogue = ops.epilogues[epilogue]
        self.ops = ops

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = self.epilogue(self._in_blocks(x) if self.weight.is_in_blocks else self._by_rows(x))
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)

    def _by_rows(self, x: Tensor) -> Tensor:
        if not len(x):  # of a step that wants no logits; torch's product takes no empty scales
            return x.new_empty(0, len(self.weight.numbers))
        numbers, scales = self.ops.quantise(x, 0)
        return torch._scaled_mm(
            numbers,
            self.weight.numbers.t(),
            scale_a=scales,
            scale_b=self.weight.scales.view(1, -1),
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    def _in_blocks(self, x: Tensor) -> Tensor:
        numbers, scales = self.ops.quantise(x, BLOCK)
        y = self.ops.block_product(numbers, scales, self.weight.numbers, self.weight.scales, x.dtype)
        return y if self.bias is None else y.add_(self.bias)
