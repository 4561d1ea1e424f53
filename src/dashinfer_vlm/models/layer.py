"""A layer of the text model: a mixer of rows, and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, Stream, StreamLinear, rows_of, whole
from dashinfer_vlm.layers.native_layer import native_layer
from dashinfer_vlm.layers.ranks import Cut
from dashinfer_vlm.models.attention import Attention, Cache, Table, gains
from dashinfer_vlm.models.base import StepBatch
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.weights import Weights

__all__ = ["GatedMlp", "Layer", "MakeMlp", "Mixer", "Mlp"]


class Mlp(Protocol):
    """[T, hidden] -> [T, hidden]; `residual` is added, and may be overwritten."""

    @property
    def first(self) -> Linear:
        """The one layer that takes x."""
        ...

    def __call__(self, x: Any, *, residual: torch.Tensor) -> Stream:
        """x is what `Backend.norm_before` makes of rows for the first layer."""
        ...


MakeMlp = Callable[[str, TextConfig, Weights, Backend], Mlp]


class Mixer(Protocol):
    """Where rows of one sequence learn of each other, through what its layer keeps of it."""

    config: TextConfig
    out: StreamLinear

    @property
    def first(self) -> Linear:
        """A layer that takes x, as `Backend.norm_before` makes it; others that take x, too, take rows as well."""
        ...

    def attend(self, x: Any, table: Table, batch: StepBatch, cache: Cache) -> torch.Tensor:
        """[T, hidden] -> what `out` projects; the cache is brought up to the step's last rows."""
        ...


class GatedMlp:
    """down(silu(gate x) * up x). Takes `{prefix}.*`."""

    def __init__(self, prefix: str, config: TextConfig, weights: Weights, backend: Backend) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        rows = {f"{prefix}.gate_proj.weight": inner, f"{prefix}.up_proj.weight": inner}
        part = backend.ranks.share(inner, "channels of the MLP")
        gate_up = weights.matrix(rows, hidden, Cut(rows=dict.fromkeys(rows, part)))
        self.first = backend.linear(gate_up, epilogue="silu_mul")
        self.down = backend.summed(weights.matrix({f"{prefix}.down_proj.weight": hidden}, inner, Cut(columns=part)))
        self.gate_up = backend.before(self.first, self.down)

    def __call__(self, x: Any, *, residual: torch.Tensor) -> Stream:
        return self.down(self.gate_up(x), residual=residual, out=residual)


class Layer:
    def __init__(self, prefix: str, attention: Mixer, mlp: Mlp, weights: Weights, backend: Backend) -> None:
        self.attention, self.mlp = attention, mlp
        config = attention.config
        eps, hidden = config.rms_norm_eps, config.hidden_size
        names = (f"{prefix}.{x}_layernorm.weight" for x in ("input", "post_attention"))
        gains1, gains2 = (gains(name, hidden, config, weights) for name in names)
        self.norm1 = backend.norm_before(attention.first, gains1, eps)
        self.norm2 = backend.norm_before(mlp.first, gains2, eps)
        self.native = None
        if type(attention) is Attention and type(mlp) is GatedMlp:  # another class may compute otherwise
            self.native = native_layer(
                backend,
                norms=(backend.vector(gains1), backend.vector(gains2)),
                qkv=attention.qkv,
                head_norms=attention.norms,
                out=attention.out,
                gate_up=mlp.first,
                down=mlp.down,
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                eps=eps,
            )

    def forward(
        self, x: Stream, table: Table, batch: StepBatch, cache: Cache, rows: torch.Tensor | None = None
    ) -> Stream:
        """[T, hidden] -> [T, hidden], or [L, hidden] of `rows` alone."""
        if self.native is not None and rows is None:
            x = whole(x)
            self.native.forward(
                x, *table, *cache, batch.slots, batch.block_tables, batch.query_starts, batch.context_lens
            )
            return x
        attended = self.attention.attend(self.norm1(x), table, batch, cache)
        residual = rows_of(x)
        if rows is not None:
            residual, attended = residual[rows], attended[rows]
        x = self.attention.out(attended, residual=residual, out=residual)  # nobody needs the rows from before
        normed = self.norm2(x)
        return self.mlp(normed, residual=rows_of(x))
