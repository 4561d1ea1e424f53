"""How weights of few bits lie in a card's memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

GROUP = 128
"""Columns that share a scale."""


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A weight [N, K], K filled up to whole groups."""

    numbers: Tensor
    """8 bits: int8 [N, K]. 4 bits: uint8 [N, K / 2], numbers + 8; byte j of a group holds
    column j in its low half and column j + 64 in its high one."""
    scales: Tensor
    """bfloat16 [N, K / 128]."""
    depth: int
    """Columns that there are."""
    bits: int
    shifts: Tensor | None = None
    """Of 4 bits, bfloat16 [N, K / 128]: what is added to the numbers of a group, 8 less its zero. None: nothing."""
