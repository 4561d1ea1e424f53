"""The layer of hybrid text models that keeps a state of fixed size in place of keys and values (Gated DeltaNet, Yang,
Kautz and Hatamizadeh 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.delta_rule import causal_conv, gated_delta_rule, l2_norm
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
        c = self.sizes
        channels, gate = self.qkv(x).split_with_sizes([c.num_channels, c.num_value_heads * c.value_dim], dim=1)
        learnt, forgotten = F.linear(x.float(), self.rates).chunk(2, dim=-1)
        beta, decay = learnt.sigmoid(), self.speed * F.softplus(forgotten + self.rate_bias)
        out = torch.empty(len(gate), c.num_value_heads, c.value_dim, device=gate.device)
        lengths = batch.query_starts.diff()
        for length in sorted(set(lengths.tolist())):  # sequences of equal length are computed together
            which = (lengths == length).nonzero().flatten()
            rows = batch.query_starts[which].long()[:, None] + torch.arange(length, device=out.device)
            seats, is_new = batch.seats[which], batch.context_lens[which] == length
            inputs, memory = (kept[seats] for kept in cache)
            inputs[is_new], memory[is_new] = 0, 0
            out[rows] = self._mix(channels[rows].float(), beta[rows], decay[rows], inputs, memory)
            for kept, new in zip(cache, (inputs, memory), strict=True):
                kept[seats] = new
        normed = self.ops.rms_norm(out.to(gate.dtype).flatten(0, 1), self.norm, self.config.rms_norm_eps)
        return normed.view(gate.shape) * F.silu(gate)

    def _mix(
        self,
        channels: torch.Tensor,
        beta: torch.Tensor,
        decay: torch.Tensor,
        inputs: torch.Tensor,
        memory: torch.Tensor,
    ) -> torch.Tensor:
        """float32 [n, T, value heads, value_dim] of n sequences, whose `inputs` and `memory` are brought up to date."""
        c, (num_sequences, num_tokens, _) = self.sizes, channels.shape
        keys = c.num_key_heads * c.key_dim
        mixed = causal_conv(channels, inputs, self.conv)
        q, k, v = mixed.split_with_sizes([keys, keys, c.num_value_heads * c.value_dim], dim=-1)
        q, k, v = (
            x.reshape(num_sequences, num_tokens, -1, d) for x, d in ((q, c.key_dim), (k, c.key_dim), (v, c.value_dim))
        )
        group = c.num_value_heads // c.num_key_heads  # value heads that share a key head
        q, k = (l2_norm(x).repeat_interleave(group, dim=2) for x in (q, k))
        return gated_delta_rule(q * c.key_dim**-0.5, k, v, beta, decay, memory)
