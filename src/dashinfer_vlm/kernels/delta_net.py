"""What a gated delta net has beside its projections."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["DeltaNet"]


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Of one layer."""

    num_key_heads: int
    """Of `Hk * key_dim` channels of queries, then as many of keys; the rest of the channels are values."""
    key_dim: int
    conv: Tensor
    """float32 [taps, C]: what the newest inputs of each channel are multiplied with, the newest one last."""
    speed: Tensor
    """float32 [H], below 0: what a value head forgets is this times a softplus."""
    rate_bias: Tensor
    """float32 [H], in that softplus."""
    gains: Tensor
    """[value_dim], of the activations' type: RMSNorm of each head's result."""
    eps: float

    def double(self) -> DeltaNet:
        """The same in float64."""
        names = ("conv", "speed", "rate_bias", "gains")
        return replace(self, **{name: getattr(self, name).double() for name in names})

    @property
    def num_value_heads(self) -> int:
        return len(self.speed)

    @property
    def value_dim(self) -> int:
        return len(self.gains)
