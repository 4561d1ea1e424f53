"""What the states of published models ask of the kernels; see `variants.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dashinfer_vlm.kernels.cuda.delta_net import delta_net
from dashinfer_vlm.kernels.delta_net import DeltaNet

__all__ = ["DeltaSizes", "calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSizes:
    """The sizes of a gated delta net."""

    key_heads: int
    value_heads: int
    dim: int
    """Of a head of either."""
    taps: int = 4


def calls(s: DeltaSizes, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls: a row by itself, streams, and prompts beside them."""
    values = s.value_heads * s.dim
    num_channels = 2 * s.key_heads * s.dim + values

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    net = DeltaNet(
        num_key_heads=s.key_heads,
        key_dim=s.dim,
        conv=empty(s.taps, num_channels),
        speed=empty(s.value_heads),
        rate_bias=empty(s.value_heads),
        gains=empty(s.dim, dtype=dtype),
        eps=1e-6,
    )

    def call(num_rows: int, num_sequences: int) -> Tensor:
        joined, rates = (empty(num_rows, n, dtype=dtype) for n in (num_channels + values, 2 * s.value_heads))
        channels, gate = joined.split_with_sizes([num_channels, values], dim=1)
        states = empty(9, s.taps - 1, num_channels), empty(9, s.value_heads, s.dim, s.dim)
        seats = empty(num_sequences, dtype=torch.int64)
        starts, contexts = (empty(n, dtype=torch.int32) for n in (num_sequences + 1, num_sequences))
        return delta_net(channels, gate, rates, net, *states, seats, starts, contexts)

    for num_rows, num_sequences, told in ((1, 1, "one row"), (128, 128, "streams"), (2048, 16, "prompts")):
        yield f"states of {told}", partial(call, num_rows, num_sequences)
