"""A mixture of experts as one call of the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dashinfer_vlm.kernels.cpu_ops import PackedWeight, extension

__all__ = ["NativeExperts"]


class NativeExperts:
    """Gated MLPs of one size, of which each row wants a few: what `linear` makes of gate_up, with `silu_mul`, and of
    down, one expert after the other over the rows that chose it.

    layers: for each expert gate_up [2 I, H], packed with `gate_up=True`, and down [H, I]. Raises ValueError where they
    do not fit each other.
    """

    def __init__(self, layers: Sequence[tuple[PackedWeight, PackedWeight]]) -> None:
        self.handle = extension().Experts([a.handle for a, _ in layers], [b.handle for _, b in layers])

    def add_to(self, out: Tensor, x: Tensor, chosen: Tensor, shares: Tensor) -> None:
        """out += sum over j of shares[:, j] * expert chosen[:, j] of x, experts by rising index.

        x, out: float32 [T, H], dense, out not x's memory; chosen: int64 [T, k], shares: float32 [T, k], dense. Raises
        ValueError for shapes, and for experts that there are not."""
        self.handle.add_to(out, x, chosen, shares)
