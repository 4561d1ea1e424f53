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

from dashinfer_vlm.layers import activation, norm
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue
from dashinfer_vlm.layers.linear import Floats, Stream, whole

__all__ = [
    "BLOCK",
    "REFERENCE",
    "Fp8Linear",
    "Fp8Ops",
    "RoundedRows",
    "block_product",
    "quantise",
    "rms_norm",
    "rounded",
    "silu_mul",
]

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


def rms_norm(x: Tensor, weight: Tensor, eps: float, group: int = 0) -> tuple[Tensor, Tensor]:
    """`quantise` of rows that are normed first."""
    return quantise(norm.rms_norm(x, weight, eps), group)


def silu_mul(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """`quantise` of what `layers.activation.silu_mul` makes of [T, 2 K]."""
    return quantise(activation.silu_mul(x), group)


@dataclass(frozen=True, slots=True)
class Fp8Ops:
    """The functions that have more than one implementation."""

    quantise: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    block_product: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    epilogues: Mapping[Epilogue, Callable[[Tensor], Tensor]]
    few_product: Callable[..., Tensor] | None = None
    """Of few rows: numbers, scales, those of the weight, type of the result, bias, residual, memory for the result."""
    most_few: int = 0
    """Rows that it takes."""
    unit: int = 1
    """Of the columns of a weight that it takes."""


REFERENCE = Fp8Ops(quantise, block_product, rms_norm, silu_mul, EPILOGUES)


def rounded(weight: Tensor, ops: Fp8Ops) -> Floats:
    """A weight [N, K] of any type with a scale per row, on its device."""
    return Floats(*ops.quantise(weight, 0), is_in_blocks=False)


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """What an `Fp8Linear` multiplies, made by whoever had the rows in hand."""

    numbers: Tensor
    """float8_e4m3fn [T, K]."""
    scales: Tensor
    """float32, as `quantise` gives them."""
    dtype: torch.dtype
    """Of the rows before, and of the result."""


class Fp8Linear:
    """See `layers.linear.Linear`. x is bfloat16 on a card, which torch's product asks for; or it is rounded already."""

    def __init__(self, weight: Floats, bias: Tensor | None, epilogue: Epilogue, ops: Fp8Ops) -> None:
        self.weight = weight
        self.bias = bias
        self.epilogue = epilogue
        self.ops = ops
        self.most_few = ops.most_few if weight.numbers.shape[1] % ops.unit == 0 else min(ops.most_few, 1)
        self.group = BLOCK if weight.is_in_blocks else 0
        """Columns of a row that share a scale; 0: all."""

    def __call__(self, x: Tensor | RoundedRows, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        x = self._rounded(x)
        if self.epilogue == "none" and self._is_few(x):
            return self._few_times(x, residual, out)
        y = self.ops.epilogues[self.epilogue](self._product(x))
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)

    def normed(self, x: Stream, weight: Tensor, eps: float) -> RoundedRows:
        """See `layers.linear.NormingLinear`; one launch."""
        x = whole(x)
        return RoundedRows(*self.ops.rms_norm(x, weight, eps, self.group), x.dtype)

    def into(self, x: Tensor | RoundedRows, then: Fp8Linear) -> RoundedRows:
        """This layer, whose epilogue is `silu_mul`, to what `then` takes."""
        assert self.epilogue == "silu_mul", self.epilogue
        y = self._product(self._rounded(x))
        return RoundedRows(*self.ops.silu_mul(y, then.group), y.dtype)

    def _rounded(self, x: Tensor | RoundedRows) -> RoundedRows:
        return x if isinstance(x, RoundedRows) else RoundedRows(*self.ops.quantise(x, self.group), x.dtype)

    def _product(self, x: RoundedRows) -> Tensor:
        if self._is_few(x):
            return self._few_times(x)
        return self._in_blocks(x) if self.weight.is_in_blocks else self._by_rows(x)

    def _is_few(self, x: RoundedRows) -> bool:
        return 0 < len(x.numbers) <= self.most_few

    def _few_times(self, x: RoundedRows, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        assert self.ops.few_product is not None
        weight = (self.weight.numbers, self.weight.scales)
        return self.ops.few_product(x.numbers, x.scales, *weight, x.dtype, self.bias, residual, out)

    def _by_rows(self, x: RoundedRows) -> Tensor:
        if not len(x.numbers):  # of a step that wants no logits; torch's product takes no empty scales
            return x.scales.new_empty(0, len(self.weight.numbers), dtype=x.dtype)
        return torch._scaled_mm(
            x.numbers,
            self.weight.numbers.t(),
            scale_a=x.scales,
            scale_b=self.weight.scales.view(1, -1),
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    def _in_blocks(self, x: RoundedRows) -> Tensor:
        y = self.ops.block_product(x.numbers, x.scales, self.weight.numbers, self.weight.scales, x.dtype)
        return y if self.bias is None else y.add_(self.bias)
