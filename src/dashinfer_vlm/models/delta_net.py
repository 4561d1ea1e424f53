"""The layer of hybrid text models that keeps a state of fixed size in place of keys and values (Gated DeltaNet, Yang,
Kautz and Hatamizadeh 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from dashinfer_vlm.kernels.delta_net import DeltaNet
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, Matrix, with_rows
from dashinfer_vlm.layers.ranks import Cut, Ranks, times
from dashinfer_vlm.models.base import StepBatch
from dashinfer_vlm.models.config import DeltaNetConfig, TextConfig
from dashinfer_vlm.models.weights import Weights

if TYPE_CHECKING:  # it chooses the layers
    from dashinfer_vlm.models.attention import Cache, Table

__all__ = ["GatedDeltaNet", "Heads", "InterleavedDeltaNet"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Those of one rank."""

    sizes: DeltaNetConfig
    keys: slice
    values: slice
    """Value heads, as `of_values` counted in their channels."""
    of_values: slice
    channels: tuple[slice, slice, slice]
    """Of the convolution: queries, keys and values."""

    @classmethod
    def of(cls, c: DeltaNetConfig, ranks: Ranks) -> Heads:
        """Each rank has the values of its keys. Raises ConfigError for heads that cannot be dealt out."""
        keys, values = (
            ranks.share(count, f"{kind} heads of gated delta nets")
            for count, kind in ((c.num_key_heads, "key"), (c.num_value_heads, "value"))
        )
        of_keys, of_values = times(keys, c.key_dim), times(values, c.value_dim)
        width = c.num_key_heads * c.key_dim
        channels = (of_keys, _moved(of_keys, width), _moved(of_values, 2 * width))
        own = replace(c, num_key_heads=_length(keys), num_value_heads=_length(values))
        return cls(own, keys, values, of_values, channels)


class GatedDeltaNet:
    """A `decoder.Mixer`. Takes `{prefix}.*`; its cache are the convolution's last inputs and the heads' memories."""

    def __init__(self, prefix: str, config: TextConfig, weights: Weights, backend: Backend) -> None:
        assert config.delta_net is not None
        c, heads = config.delta_net, Heads.of(config.delta_net, backend.ranks)
        self.sizes = heads.sizes
        self.config, self.ops = config, backend.ops
        hidden, width = config.hidden_size, c.num_value_heads * c.value_dim
        joined, rates = self.projections(prefix, c, hidden, heads, weights)
        # few and decisive, how much is learnt and how much is forgotten: they are not rounded with the others
        self.rates = backend.unrounded(rates) if backend.is_quantised else None
        self.joined = backend.linear(joined if self.rates else with_rows(joined, rates))
        self.out = backend.summed(
            weights.matrix({f"{prefix}.out_proj.weight": hidden}, width, Cut(columns=heads.of_values))
        )
        vectors = (weights.take(f"{prefix}.{x}", c.num_value_heads).float() for x in ("A_log", "dt_bias"))
        a_log, bias = (x[heads.values] for x in vectors)
        conv = weights.take(f"{prefix}.conv1d.weight", c.num_channels, 1, c.conv_size)
        self.net = DeltaNet(
            num_key_heads=self.sizes.num_key_heads,
            key_dim=c.key_dim,
            conv=torch.cat([conv[part, 0] for part in heads.channels]).float().t().contiguous().to(backend.device),
            speed=a_log.exp().neg().to(backend.device),
            rate_bias=bias.to(backend.device, copy=True),
            gains=backend.vector(weights.take(f"{prefix}.norm.weight", c.value_dim)),
            eps=config.rms_norm_eps,
        )

    @staticmethod
    def projections(
        prefix: str, c: DeltaNetConfig, hidden: int, heads: Heads, weights: Weights
    ) -> tuple[Matrix, torch.Tensor]:
        """Of this rank's heads: rows for queries, keys, values and gates; and those of how much is learnt, above those
        of how much is forgotten, [2 * value heads, hidden]."""
        qkv, z = f"{prefix}.in_proj_qkv.weight", f"{prefix}.in_proj_z.weight"
        cut = Cut(rows={qkv: heads.channels, z: heads.of_values})
        joined = weights.matrix({qkv: c.num_channels, z: c.num_value_heads * c.value_dim}, hidden, cut)
        rates = [weights.take(f"{prefix}.in_proj_{x}.weight", c.num_value_heads, hidden) for x in "ba"]
        return joined, torch.cat([x[heads.values] for x in rates])

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


class InterleavedDeltaNet(GatedDeltaNet):
    """The same where all that is projected for one key head lies together: rows for its query, its key, its values and
    their gates in one matrix, and for how much they learn and forget in another."""

    @staticmethod
    def projections(
        prefix: str, c: DeltaNetConfig, hidden: int, heads: Heads, weights: Weights
    ) -> tuple[Matrix, torch.Tensor]:
        each = c.num_value_heads // c.num_key_heads
        sizes = (c.key_dim, c.key_dim, each * c.value_dim, each * c.value_dim)
        qkvz, num_rows = f"{prefix}.in_proj_qkvz.weight", c.num_key_heads * sum(sizes)
        joined = weights.matrix({qkvz: num_rows}, hidden, Cut(rows={qkvz: _kind_by_kind(heads.keys, sizes)}))
        rates = weights.take(f"{prefix}.in_proj_ba.weight", 2 * c.num_value_heads, hidden)
        return joined, torch.cat([rates[part] for part in _kind_by_kind(heads.keys, (each, each))])


def _kind_by_kind(keys: slice, sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """Of rows of which each key head has `sizes` of several kinds, those of the heads `keys`: all of the first kind,
    then all of the next."""
    starts = accumulate(sizes[:-1], initial=0)
    rows = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return tuple(_moved(part, head * sum(sizes)) for part in rows for head in range(keys.start, keys.stop))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length
