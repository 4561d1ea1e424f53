"""The layer of hybrid text models that keeps a state of fixed size in place of keys and values (Gated DeltaNet, Yang,
Kautz and Hatamizadeh 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dashinfer_vlm.kernels.delta_net import DeltaNet
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, with_rows
from dashinfer_vlm.models.base import StepBatch
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.weights import Weights

if TYPE_CHECKING:  # it chooses the layers
    from dashinfer_vlm.models.decoder import Cache, Table

__all__ = ["GatedDeltaNet"]


class GatedDeltaNet:
    """A `decoder.Mixer`. Takes `{prefix}.*`; its cache are the convolution's last inputs and the heads' memories."""

    def __init__(self, prefix: str, config: TextConfig, weights: Weights, backend: Backend) -> None:
        assert config.delta_net is not None
        c = self.sizes = config.delta_net
        self.config, self.ops = config, backend.ops
        hidden, width = config.hidden_size, c.num_value_heads * c.value_dim
        rows = {f"{prefix}.in_proj_qkv.weight": c.num_channels, f"{prefix}.in_proj_z.weight": width}
        joined = weights.matrix(rows, hidden)
        both = torch.cat([weights.take(f"{prefix}.in_proj_{x}.weight", c.num_value_heads, hidden) for x in "ba"])
        # few and decisive, how much is learnt and how much is forgotten: they are not rounded with the others
        self.rates = backend.unrounded(both) if backend.is_quantised else None
        self.joined = backend.linear(joined if self.rates else with_rows(joined, both))
        self.out = backend.summed(weights.matrix({f"{prefix}.out_proj.weight": hidden}, width))
        a_log, bias = (weights.take(f"{prefix}.{x}", c.num_value_heads).float() for x in ("A_log", "dt_bias"))
        conv = weights.take(f"{prefix}.conv1d.weight", c.num_channels, 1, c.conv_size)
        self.net = DeltaNet(
            num_key_heads=c.num_key_heads,
            key_dim=c.key_dim,
            conv=conv[:, 0].float().t().contiguous().to(backend.device),
            speed=a_log.exp().neg().to(backend.device),
            rate_bias=bias.to(backend.device, copy=True),
            gains=backend.vector(weights.take(f"{prefix}.norm.weight", c.value_dim)),
            eps=config.rms_norm_eps,
        )

    @property
    def first(self) -> Linear:
        return self.rates or self.joined

    def attend(self, x: Any, table: Table, batch: StepBatch, cache: Cache) -> torch.Tensor:
        """[T, hidden] -> [T, value heads * value_dim]. The states in `batch.seats` become those after the step's rows;
        a sequence that these rows begin with begins with zeros."""
        assert batch.seats is not None, "a cache with states"
        c = self.sizes
        ends = (c.num_channels, c.num_channels + c.num_value_heads * c.value_dim)
        channels, gate, rates = self.joined(x).tensor_split(ends, dim=1)
        rates = self.rates(x) if self.rates else rates
        where = (batch.seats, batch.query_starts, batch.context_lens)
        return self.ops.gated_delta_net(channels, gate, rates, self.net, *cache, *where)
