"""Layers that keep a state of each sequence: from the joined projections to what the last one takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from card_checks.cases import Case
from card_checks.models import checked_backend
from card_checks.results import Setting
from dashinfer_vlm.kernels.delta_net import DeltaNet
from dashinfer_vlm.layers.ops import REFERENCE

SMALL = ("decode", [1, 1, 1], [1, 37, 70]), ("mixed step", [1, 150, 3, 20], [40, 150, 33, 90])
"""Names, rows of each sequence, and tokens with those in front of them."""
SERVED = (
    ("decode 1", [1], [1024]),
    ("decode 64", [1] * 64, [1024] * 64),
    ("prefill 8k", [8192], [8192]),
    ("mixed step", [1] * 64 + [1984], [1024] * 64 + [4096]),
)


def cases(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Odd sizes, or those of Qwen3.5-9B."""
    heads, dims = ((1, 3), (16, 24)) if small else ((16, 32), (128, 128))
    for name, rows, contexts in SMALL if small else SERVED:
        yield _case(setting, dtype, f"states, {name}", heads, dims, rows, contexts, keeps=small)


def _case(
    setting: Setting,
    dtype: torch.dtype,
    name: str,
    heads: tuple[int, int],
    dims: tuple[int, int],
    rows: list[int],
    contexts: list[int],
    *,
    keeps: bool,
) -> Case:
    """With `keeps` each call begins with the same states, and they are compared, too. Bound by bytes: states once
    there and back, rows once; or by products, a chunk's with its memory."""

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype)

    ops, num_rows, count = checked_backend(setting, dtype).ops, sum(rows), len(rows)
    (num_keys, num_values), (key_dim, value_dim) = heads, dims
    values = num_values * value_dim
    num_channels = 2 * num_keys * key_dim + values
    joined = random(num_rows, num_channels + values + 2 * num_values, dtype=dtype)
    net = DeltaNet(
        num_key_heads=num_keys,
        key_dim=key_dim,
        conv=random(4, num_channels),
        speed=-0.1 * random(num_values).exp(),
        rate_bias=random(num_values),
        gains=random(value_dim, dtype=dtype),
        eps=1e-6,
    )
    states = random(count, 3, num_channels), random(count, num_values, key_dim, value_dim)
    starts = torch.tensor([0, *accumulate(rows)], dtype=torch.int32, device=setting.device)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=setting.device)
    where = (torch.randperm(count, device=setting.device), starts, lengths)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.split_with_sizes([num_channels, values, 2 * num_values], dim=1)

    def run() -> Tensor:
        if not keeps:
            return ops.gated_delta_net(*split(joined), net, *states, *where)
        inputs, memory = (x.clone() for x in states)
        out = ops.gated_delta_net(*split(joined), net, inputs, memory, *where)
        return torch.cat([x.float().flatten() for x in (out, inputs, memory)])

    def want() -> Tensor:
        inputs, memory = (x.double() for x in states)
        out = REFERENCE.gated_delta_net(*split(joined.double()), net.double(), inputs, memory, *where)
        return torch.cat([x.flatten() for x in (out, inputs, memory)])

    num_bytes = joined.nbytes + num_rows * values * dtype.itemsize + 2 * sum(x.nbytes for x in states)
    flops = 2 * num_rows * num_values * 3 * key_dim * value_dim
    return Case(name, run, want, num_bytes, flops, bar=2.0)
