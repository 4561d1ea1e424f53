"""What a check of a kernel consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BFLOAT16_ERROR = 1e-2


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel and what it should give."""

    name: str
    run: Callable[[], Tensor]
    want: Callable[[], Tensor]
    num_bytes: float = 0
    flops: float = 0
    """Of products in attention."""
    bar: float = 1.5
    allowed: float = 0
    """Error beyond which it is wrong, where the type's own is less."""
