"""The text model that all families share: attention with grouped queries over the paged cache, and a gated MLP.

A family chooses the modules: `Decoder(config.text, weights, backend, attention=partial(Attention, qkv_bias=True))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.kernels.head_norms import HeadNorms
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, Matrix, Stream, StreamLinear, rows_of, whole
from dashinfer_vlm.layers.native_layer import native_layer
from dashinfer_vlm.layers.ranks import Cut, times
from dashinfer_vlm.layers.rotary import axes_of_channels, inverse_frequencies, yarn_frequencies
from dashinfer_vlm.models.base import KVCache, StepBatch, TextShape
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.delta_net import GatedDeltaNet
from dashinfer_vlm.models.draft_head import DRAFT_LAYER, DRAFT_TENSOR, DraftHead
from dashinfer_vlm.models.experts import ExpertMlp
from dashinfer_vlm.models.published import HEAD
from dashinfer_vlm.models.read_out import ReadOut
from dashinfer_vlm.models.rope import Rope
from dashinfer_vlm.models.weights import Weights

__all__ = ["Attention", "Decoder", "GatedAttention", "GatedMlp", "Rotary"]

Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, or the inputs and the memory of `KVCache.states`."""
Table = tuple[torch.Tensor, torch.Tensor]
"""float32 [T, head_dim / 2] cosines and sines of the step's positions; fewer columns where heads turn in part."""


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


class Rotary:
    """Turns a step's positions into its table."""

    def __init__(self, rope: Rope, backend: Backend) -> None:
        device, self.ops = backend.device, backend.ops
        self.frequencies, self.scale = inverse_frequencies(2 * sum(rope.sections), rope.theta, device), 1.0
        if rope.yarn is not None:
            yarn = rope.yarn
            self.frequencies = yarn_frequencies(
                self.frequencies, rope.theta, yarn.factor, yarn.original_length, (yarn.beta_fast, yarn.beta_slow)
            )
            self.scale = yarn.attention_factor
        self.axes = axes_of_channels(rope.sections, device, interleaved=rope.interleaved)

    def __call__(self, positions: torch.Tensor) -> Table:
        cos, sin = self.ops.mrope_cos_sin(positions, self.frequencies, self.axes)
        return (cos, sin) if self.scale == 1 else (cos * self.scale, sin * self.scale)


class Decoder:
    """Embedding, layers, final norm and head. Takes every `model.*` and `lm_head.*` tensor of `weights`."""

    def __init__(
        self,
        config: TextConfig,
        weights: Weights,
        backend: Backend,
        *,
        attention: Callable[[str, TextConfig, Weights, Backend], Attention],
        delta_net: type[GatedDeltaNet] = GatedDeltaNet,
        mlp: MakeMlp = GatedMlp,
        deepstack: int = 0,
    ) -> None:
        """`attention` is for layers without states, `delta_net` for those with, `mlp` for those without a mixture of
        experts. `deepstack` layers from the first on add columns of an item's embedding to its rows (DeepStack, Meng et
        al. 2024): those of layer i follow the columns that overwrite word embeddings, after i times as many."""
        assert deepstack < config.num_layers, (deepstack, config.num_layers)
        self.deepstack = deepstack
        self.config = config
        self.backend = backend
        self.rotary = Rotary(config.rope, backend)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = backend.weight(weights.take("model.embed_tokens.weight", *shape))

        def make_layer(prefix: str, *, recurs: bool, has_experts: bool) -> _Layer:
            mixer: Mixer
            if recurs:
                mixer = delta_net(f"{prefix}.linear_attn", config, weights, backend)
            else:
                mixer = attention(f"{prefix}.self_attn", config, weights, backend)
            make = ExpertMlp if has_experts else mlp
            return _Layer(prefix, mixer, make(f"{prefix}.mlp", config, weights, backend), weights, backend)

        recurrent = config.delta_net.layers if config.delta_net else frozenset()
        mixed = config.mixture.layers if config.mixture else frozenset()
        self.layers = [
            make_layer(f"model.layers.{i}", recurs=i in recurrent, has_experts=i in mixed)
            for i in range(config.num_layers)
        ]
        self.draft_head: DraftHead | None = None
        if DRAFT_TENSOR in weights:
            draft_layer = make_layer(DRAFT_LAYER, recurs=False, has_experts=bool(mixed))
            self.draft_head = DraftHead(config, weights, backend, draft_layer)
        self.head = self._make_head(weights)
        of_norm, eps = gains("model.norm.weight", config.hidden_size, config, weights), config.rms_norm_eps
        self.norm = None if self.head is None else backend.norm_before(self.head, of_norm, eps)
        self.read_out = ReadOut(of_norm, self.embedding, config, weights)

    def _make_head(self, weights: Weights) -> Linear | None:
        """None for a model that was published for vectors, without one, or whose architecture has another."""
        vocab_size, hidden_size = self.embedding.shape
        if self.config.scoring and self.config.scoring.matrix != HEAD:
            return None
        part = self.backend.ranks.share(vocab_size, "words of the vocabulary")
        if not self.config.tie_word_embeddings:
            if self.config.embeds and HEAD not in weights:
                return None
            return self.backend.head(weights.matrix({HEAD: vocab_size}, hidden_size, Cut(rows={HEAD: part})))
        if HEAD in weights:  # some exports write the tied head once more
            again = weights.take(HEAD, *self.embedding.shape)
            if not torch.equal(again.to(self.embedding), self.embedding):
                raise CheckpointError(
                    f"{weights.folder}: {HEAD} differs from model.embed_tokens.weight, yet config.json sets "
                    "tie_word_embeddings"
                )
        rows = self.embedding[part]
        return self.backend.head(Matrix(HEAD, len(rows), hidden_size, lambda: rows, is_kept=True))

    @property
    def shape(self) -> TextShape:
        """Of what this rank holds."""
        attending = [layer.attention for layer in self.layers if isinstance(layer.attention, Attention)]
        recurrent = [layer.attention for layer in self.layers if isinstance(layer.attention, GatedDeltaNet)]
        return TextShape(
            vocab_size=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            num_kv_layers=len(attending) + (self.draft_head is not None),
            num_kv_heads=attending[0].num_kv_heads,
            head_dim=self.config.head_dim,
            max_position_embeddings=self.config.max_position_embeddings,
            delta_net=recurrent[0].sizes if recurrent else None,
            has_head=self.head is not None,
        )

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        """One step over packed tokens; float32 logits [L, vocab] of `batch.logits_rows`."""
        return self._logits(self._states(batch, kv))

    def forward_with_vectors(self, batch: StepBatch, kv: KVCache, num_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `models.base.Model`."""
        x = whole(self._states(batch, kv))
        return self._logits(x[:num_logits]), self.read_out(x[num_logits:])

    def forward_with_states(
        self, batch: StepBatch, kv: KVCache, num_logits: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `models.base.GuessingModel`."""
        assert self.head is not None, "nothing to guess for"
        assert self.norm is not None
        x, wanted = whole(self._states(batch, kv, all_rows=True)), batch.logits_rows
        states = self.norm(x)
        logits = self.head(states[wanted[:num_logits]]).float()
        return logits, self.read_out(x[wanted[num_logits:]]), states

    def guess(self, batch: StepBatch, states: torch.Tensor, kv: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """See `models.base.GuessingModel`."""
        assert self.draft_head is not None, "nothing to guess with"
        assert self.head is not None
        cache = kv.keys[-1], kv.values[-1]
        x = self.draft_head.forward(self._embedded(batch), states, self.rotary(batch.positions), batch, cache)
        return self.head(x).float(), x

    def _logits(self, x: Stream) -> torch.Tensor:
        """float32 [L, vocab]. Without a head all rows are padding."""
        if self.head is None or self.norm is None:
            return torch.zeros(len(rows_of(x)), self.config.vocab_size, device=self.backend.device)
        return self.head(self.norm(x)).float()

    def _embedded(self, batch: StepBatch) -> torch.Tensor:
        """[T, hidden] in front of the first layer."""
        staged = (None, None) if batch.staged is None else (batch.staged.rows, batch.staged.is_item)
        embedded = self.backend.ops.embed(batch.ids, self.embedding, self.backend.activation_dtype, *staged)
        for item in batch.embeddings:
            embedded[item.start : item.start + len(item.rows)] = item.rows[:, : self.config.hidden_size]
        return embedded

    def _states(self, batch: StepBatch, kv: KVCache, *, all_rows: bool = False) -> Stream:
        """[L, hidden] of `batch.logits_rows` behind the last layer, or [T, hidden]."""
        x: Stream = self._embedded(batch)
        table = self.rotary(batch.positions)
        pages, states = zip(kv.keys, kv.values, strict=True), zip(*kv.states, strict=True)  # the head's is left over
        caches = [next(pages if isinstance(layer.attention, Attention) else states) for layer in self.layers]
        for i, (layer, cache) in enumerate(zip(self.layers[:-1], caches[:-1], strict=True)):
            x = layer.forward(x, table, batch, cache)
            if i < self.deepstack and (batch.embeddings or batch.staged is not None):
                x = whole(x)
                self._add_deepstack(x, i, batch)
        # the last layer owes K and V of all rows to the cache, but only the wanted rows go on from its attention
        return self.layers[-1].forward(x, table, batch, caches[-1], rows=None if all_rows else batch.logits_rows)

    def _add_deepstack(self, x: torch.Tensor, layer: int, batch: StepBatch) -> None:
        """Ready-made embeddings of the hidden size have nothing to add."""
        size = self.config.hidden_size
        for item in batch.embeddings:
            if item.rows.shape[1] > size:
                x[item.start : item.start + len(item.rows)] += item.rows[:, (layer + 1) * size : (layer + 2) * size]
        if batch.staged is not None:
            more = batch.staged.rows[:, (layer + 1) * size : (layer + 2) * size]
            x += torch.where(batch.staged.is_item[:, None], more, torch.zeros_like(more))


class _Layer:
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
