"""The layer of hybrid text models that keeps a state of fixed size in place of keys and values (Gated DeltaNet, Yang,
Kautz and Hatamizadeh 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from dashinfer_vlm.layers.backend import Backend
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
        self.qkv = backend.linear(weights.matrix(rows, hidden))
        self.out = backend.summed(weights.matrix({f"{prefix}.out_proj.weight": hidden}, width))
        self.norm = backend.vector(weights.take(f"{prefix}.norm.weight", c.value_dim))
        # few and decisive: how much is forgotten and how much is learnt; never rounded further than they are stored
        both = [weights.take(f"{prefix}.in_proj_{x}.weight", c.num_value_heads, hidden).float() for x in "ba"]
        self.rates = torch.cat(both).to(backend.device)
        a_log, bias = (weights.take(f"{prefix}.{x}", c.num_value_heads).float() for x in ("A_log", "dt_bias"))
        self.speed, self.rate_bias = a_log.exp().neg().to(backend.device), bias.to(backend.device, copy=True)
        conv = weights.take(f"{prefix}.conv1d.weight", c.num_channels, 1, c.conv_size)
        self.conv = conv[:, 0].float().t().contiguous().to(backend.device)

    def attend(self, x: Any, table: Table, batch: StepBatch, cache: Cache) -> torch.Tensor:
        """[T, hidden] -> [T, value heads * value_dim]. The states in `batch.seats` become those after the step's rows;
        a sequence that these rows begin with begins with zeros."""
        assert batch.seats is not None, "a cache with states"
        c, where, (inputs, memory) = self.sizes, (batch.seats, batch.query_starts, batch.context_lens), cache
        keys, values = c.num_key_heads * c.key_dim, c.num_value_heads * c.value_dim
        channels, gate = self.qkv(x).split_with_sizes([c.num_channels, values], dim=1)
        mixed = self.ops.causal_conv(channels.float(), inputs, self.conv, *where)
        parts = zip(
            mixed.split_with_sizes([keys, keys, values], dim=1), (c.key_dim, c.key_dim, c.value_dim), strict=True
        )
        q, k, v = (part.view(len(mixed), -1, dim) for part, dim in parts)
        learnt, forgotten = F.linear(x.float(), self.rates).chunk(2, dim=-1)
        decay = self.speed * F.softplus(forgotten + self.rate_bias)
        out = self.ops.delta_rule(q, k, v, learnt.sigmoid(), decay, memory, *where)
        normed = self.ops.rms_norm(out.to(gate.dtype).flatten(0, 1), self.norm, self.config.rms_norm_eps)
        return normed.view(gate.shape) * F.silu(gate)
