"""Attention with grouped queries over the paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dashinfer_vlm.kernels.head_norms import HeadNorms
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear
from dashinfer_vlm.layers.ranks import Cut, times
from dashinfer_vlm.models.base import StepBatch
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.weights import Weights

__all__ = ["Attention", "Cache", "GatedAttention", "Table", "gains"]

Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, or the inputs and the memory of `KVCache.states`."""
Table = tuple[torch.Tensor, torch.Tensor]
"""float32 [T, head_dim / 2] cosines and sines of the step's positions; fewer columns where heads turn in part."""


class Attention:
    """Grouped-query attention. Takes `{prefix}.*`; with `qk_norm`, an RMSNorm over each head of queries and keys."""

    q_parts = 1
    """Vectors of a head's size that `q_proj` gives for each head."""

    def __init__(
        self,
        prefix: str,
        config: TextConfig,
        weights: Weights,
        backend: Backend,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        self.config = config
        self.ops = backend.ops
        heads = backend.ranks.share(config.num_heads, "attention heads")
        kv_heads = backend.ranks.share(config.num_kv_heads, "heads of keys and values", may_repeat=True)
        self.num_heads, self.num_kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        names, sizes = tuple(f"{prefix}.{x}_proj" for x in "qkv"), (self.q_parts * query, key, key)
        of_queries, of_keys = (times(part, config.head_dim) for part in (heads, kv_heads))
        parts = dict(zip(names, (times(of_queries, self.q_parts), of_keys, of_keys), strict=True))
        self.qkv = _joined(names, sizes, parts, config.hidden_size, weights, backend, has_bias=qkv_bias)
        out = weights.matrix({f"{prefix}.o_proj.weight": config.hidden_size}, query, Cut(columns=of_queries))
        self.out = backend.summed(out)
        self.norms: HeadNorms | None = None
        if qk_norm:
            of_q, of_k = (gains(f"{prefix}.{x}_norm.weight", config.head_dim, config, weights) for x in "qk")
            self.norms = HeadNorms(backend.vector(of_q), backend.vector(of_k), config.rms_norm_eps)

    @property
    def first(self) -> Linear:
        return self.qkv

    def attend(self, x: Any, table: Table, batch: StepBatch, cache: Cache) -> torch.Tensor:
        """[T, hidden], as `Backend.norm_before` makes it for `qkv`, -> [T, heads * head_dim], which `out` projects; K
        and V go to `batch.slots` of the cache. Heads are those of this rank."""
        c = self.config
        joined = self.qkv(x)
        heads = joined.view(len(joined), -1, c.head_dim)
        q, k, v = heads.split_with_sizes([self.q_parts * self.num_heads, *2 * [self.num_kv_heads]], dim=1)
        return self.over_cache(q, k, v, table, batch, cache).flatten(1)

    def over_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: Table, batch: StepBatch, cache: Cache
    ) -> torch.Tensor:
        """[T, heads, head_dim] of queries and what the cache holds when k and v are in it."""
        where = (batch.slots, batch.block_tables, batch.query_starts, batch.context_lens)
        return self.ops.attend(q, k, v, *table, *cache, *where, self.config.head_dim**-0.5, self.norms)


class GatedAttention(Attention):
    """The same with a gate for each channel of the result; `q_proj` gives query and gate of one head after the
    other."""

    q_parts = 2

    def over_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: Table, batch: StepBatch, cache: Cache
    ) -> torch.Tensor:
        queries, gates = q[:, ::2], q[:, 1::2]
        return self.ops.sigmoid_mul(super().over_cache(queries, k, v, table, batch, cache), gates)


def gains(name: str, size: int, config: TextConfig, weights: Weights) -> torch.Tensor:
    """What an RMSNorm multiplies with; float32 [size]."""
    return weights.take(name, size).float() + config.norm_offset


def _joined(
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    parts: Mapping[str, slice],
    depth: int,
    weights: Weights,
    backend: Backend,
    *,
    has_bias: bool,
) -> Linear:
    """One layer of several, of each of which this rank holds a part."""
    rows = {f"{name}.weight": size for name, size in zip(names, sizes, strict=True)}
    cut = Cut(rows={f"{name}.{kind}": part for name, part in parts.items() for kind in ("weight", "bias")})
    bias = weights.join(tuple(f"{name}.bias" for name in names), sizes, cut) if has_bias else None
    return backend.linear(weights.matrix(rows, depth, cut), bias)
