"""The text model that all families share.

A family chooses the modules: `Decoder(config.text, weights, backend, attention=partial(Attention, qkv_bias=True))`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, Matrix, Stream, rows_of, whole
from dashinfer_vlm.layers.ranks import Cut
from dashinfer_vlm.layers.rotary import axes_of_channels, inverse_frequencies, yarn_frequencies
from dashinfer_vlm.models.attention import Attention, Table, gains
from dashinfer_vlm.models.base import KVCache, StepBatch, TextShape
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.delta_net import GatedDeltaNet
from dashinfer_vlm.models.draft_head import DRAFT_LAYER, DRAFT_TENSOR, DraftHead
from dashinfer_vlm.models.experts import ExpertMlp
from dashinfer_vlm.models.layer import GatedMlp, Layer, MakeMlp, Mixer
from dashinfer_vlm.models.published import HEAD
from dashinfer_vlm.models.read_out import ReadOut
from dashinfer_vlm.models.rope import Rope
from dashinfer_vlm.models.weights import Weights

__all__ = ["Decoder", "Rotary"]


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

        def make_layer(prefix: str, *, recurs: bool, has_experts: bool) -> Layer:
            mixer: Mixer
            if recurs:
                mixer = delta_net(f"{prefix}.linear_attn", config, weights, backend)
            else:
                mixer = attention(f"{prefix}.self_attn", config, weights, backend)
            make = ExpertMlp if has_experts else mlp
            return Layer(prefix, mixer, make(f"{prefix}.mlp", config, weights, backend), weights, backend)

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
