"""What published mixtures ask of the kernels; see `variants.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dashinfer_vlm.kernels.cuda import experts, experts_floats, experts_grouped, fp8
from dashinfer_vlm.kernels.cuda.experts_floats import Stack
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = ["MIXTURES", "Mixture", "calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The sizes of a layer of experts."""

    hidden: int
    inner: int
    """Channels of an expert."""
    experts: int
    count: int
    """Of experts that are chosen for a row."""


MIXTURES = {"Qwen3-VL-30B-A3B": Mixture(hidden=2048, inner=768, experts=128, count=8)}
"""Published ones; what surrounds their experts is as in `PUBLISHED`."""


def calls(s: Mixture, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls, of rows by themselves and in tiles of 16, 64 and 128."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    kinds = {kind: partial(multiply, gate_up=gate_up, down=down)
             for kind, multiply, gate_up, down in _kinds(s, dtype, device)}  # fmt: skip
    for num_rows, told in ((1, "one row"), (16, "few rows"), (256, "some rows"), (2048, "many rows")):
        x, shares = empty(num_rows, s.hidden), empty(num_rows, s.count)
        chosen = empty(num_rows, s.count, dtype=torch.int32)
        if num_rows <= 16:
            logits = empty(num_rows, s.experts)
            yield f"experts chosen for {told}", partial(experts.choose, logits, s.count, normalise=True)
        for kind, multiply in kinds.items():
            yield f"{kind}experts of {told}", partial(multiply, x, chosen=chosen, shares=shares, residual=x)


def _kinds(
    s: Mixture, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[..., Tensor], Any, Any]]:
    """What a kind is called before the word "experts", and its weights."""
    gate_up, down = (s.experts, 2 * s.inner, s.hidden), (s.experts, s.hidden, s.inner)

    def stack(shape: tuple[int, ...], *edges: int) -> Stack:
        sides = [-(-side // edge) for side, edge in zip(shape[1:], edges, strict=True)]
        numbers = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return Stack(numbers, torch.empty(shape[0], *sides, device=device))

    def few(shape: tuple[int, ...], bits: int, *, has_zeros: bool = False) -> GroupedWeight:
        num_rows, groups = shape[0] * shape[1], -(-shape[2] // GROUP)
        numbers = torch.empty(num_rows, groups * GROUP * bits // 8, dtype=torch.int8, device=device)
        scales = torch.empty(num_rows, groups, dtype=torch.bfloat16, device=device)
        shifts = scales if has_zeros else None
        return GroupedWeight(numbers if bits == 8 else numbers.view(torch.uint8), scales, shape[2], bits, shifts)

    def in_blocks(shape: tuple[int, ...]) -> Stack:
        return stack(shape, fp8.BLOCK, fp8.BLOCK)

    def whole(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    yield "", experts.multiply, whole(gate_up), whole(down)
    yield "fp8 ", experts_floats.multiply, stack(gate_up, 1, s.hidden), stack(down, 1, s.inner)
    yield "fp8 in blocks ", experts_floats.multiply, in_blocks(gate_up), in_blocks(down)
    for bits in (8, 4):
        yield f"{bits}-bit ", experts_grouped.multiply, few(gate_up, bits), few(down, bits)
    with_zeros = few(gate_up, 4, has_zeros=True), few(down, 4, has_zeros=True)
    yield "4-bit with zeros ", experts_grouped.multiply, *with_zeros
