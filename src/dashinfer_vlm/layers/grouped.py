"""Weights of 8 or 4 bits for cards, with a scale for each row and 128 columns: the numbers that processors compute with
(`kernels.cpu_ops.pack_linear_int8` and `pack_linear_int4`) in a layout that a card reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.linear import Linear, Nibbles, RowToNorm, Stream, whole

__all__ = ["BITS", "GroupedLinear", "GroupedOps", "as_stored", "expand", "rounded"]

BITS = {"a16w8": (8, 8), "a16w4": (4, 8)}
"""Of the layers and of the head of the text model; see `layers.quantise.QUANT_TYPES`."""


def rounded(weight: Tensor, bits: int) -> GroupedWeight:
    """[N, K] of any type in 8 or 4 bits, on its device."""
    num_rows, depth = weight.shape
    groups = F.pad(weight.float(), (0, -depth % GROUP)).view(num_rows, -1, GROUP)
    if bits == 8:
        scales = (groups.abs().amax(2) / 127).bfloat16()
        return GroupedWeight(_divided(groups, scales, -127, 127).flatten(1).to(torch.int8), scales, depth, bits)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    scales = (largest / -8).bfloat16()
    numbers = (_divided(groups, scales, -8, 7) + 8).to(torch.uint8)
    packed = numbers[..., : GROUP // 2] | numbers[..., GROUP // 2 :] << 4
    return GroupedWeight(packed.flatten(1), scales, depth, bits)


def as_stored(nibbles: Nibbles, depth: int, device: torch.device) -> GroupedWeight:
    """4 bits in groups of 128 columns as the checkpoint has them, scales in bfloat16."""
    numbers, scales, zeros = nibbles.read()
    assert nibbles.group == GROUP, nibbles
    groups = F.pad(numbers.to(device), (0, -depth % GROUP), value=8).view(len(numbers), -1, GROUP)
    packed = groups[..., : GROUP // 2] | groups[..., GROUP // 2 :] << 4
    shifts = None if zeros is None or bool((zeros == 8).all()) else (8 - zeros.to(device).bfloat16())
    return GroupedWeight(packed.flatten(1), scales.to(device, torch.bfloat16), depth, 4, shifts)


def _divided(groups: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    wide = scales.float()[..., None]
    return (groups * torch.where(wide != 0, 1 / wide, 0)).round().clamp(least, most)


def expand(weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """[N, K] of `dtype`: what the numbers stand for."""
    numbers, num_rows = weight.numbers, len(weight.numbers)
    if weight.bits == 4:
        halves = numbers.view(num_rows, -1, GROUP // 2)
        numbers = torch.cat((halves & 15, halves >> 4), dim=2).to(torch.int8) - 8
    wide = numbers.view(num_rows, -1, GROUP).to(torch.float32)
    if weight.shifts is not None:
        wide = wide + weight.shifts.float()[..., None]
    wide = wide * weight.scales.float()[..., None]
    return wide.flatten(1)[:, : weight.depth].to(dtype)


@dataclass(frozen=True, slots=True)
class GroupedOps:
    """How one device multiplies."""

    few: Callable[
        [Tensor | RowToNorm, GroupedWeight, Tensor | None, bool, Tensor | None, torch.dtype, Tensor | None], Tensor
    ]
    """x [T, K], weight, bias, whether the epilogue is `silu_mul`, residual, type of the result, memory for it; for up
    to `most_rows` of x."""
    most_rows: int
    most_normed: int
    """Columns of a row by itself that `few` can norm."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    expand: Callable[[GroupedWeight, torch.dtype], Tensor]
    plain: Callable[[Tensor, Tensor | None, Epilogue], Linear]
    """The layer of an expanded weight, for more rows."""
    plain_head: Callable[[Tensor, Tensor | None, Epilogue], Linear]


class GroupedLinear:
    """See `layers.linear.Linear`. A head gives float32."""

    def __init__(
        self, weight: GroupedWeight, bias: Tensor | None, epilogue: Epilogue, ops: GroupedOps, *, is_head: bool = False
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.epilogue: Epilogue = epilogue
        self.ops = ops
        self.is_head = is_head

    def normed(self, x: Stream, weight: Tensor, eps: float) -> Tensor | RowToNorm:
        """See `layers.linear.NormingLinear`."""
        x = whole(x)
        if len(x) == 1 and x.shape[1] <= self.ops.most_normed:
            return RowToNorm(x, weight, eps)
        return self.ops.rms_norm(x, weight, eps)

    def __call__(self, x: Tensor | RowToNorm, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor) and (len(x) > self.ops.most_rows or self.epilogue not in ("none", "silu_mul")):
            plain = self.ops.plain_head if self.is_head else self.ops.plain
            return plain(self.ops.expand(self.weight, x.dtype), self.bias, self.epilogue)(x, residual=residual, out=out)
        dtype = torch.float32 if self.is_head else x.dtype
        return self.ops.few(x, self.weight, self.bias, self.epilogue == "silu_mul", residual, dtype, out)
