"""The text model of Qwen2-VL and Qwen2.5-VL: Qwen2 with grouped-query attention and M-RoPE."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import Linear, Matrix
from dashinfer_vlm.layers.rotary import inverse_frequencies, mrope_cos_sin
from dashinfer_vlm.models.base import KVCache, StepBatch, TextShape
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen2Decoder"]


class Qwen2Decoder:
    """Embedding, layers, final norm and head. Takes every `model.*` and `lm_head.*` tensor of `weights`."""

    def __init__(self, config: TextConfig, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self.frequencies = inverse_frequencies(config.head_dim, config.rope_theta, backend.device)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = backend.weight(weights.take("model.embed_tokens.weight", *shape))
        self.layers = [_Layer(config, i, weights, backend) for i in range(config.num_layers)]
        self.norm = backend.vector(weights.take("model.norm.weight", config.hidden_size))
        self.head = self._make_head(weights)

    def _make_head(self, weights: Weights) -> Linear:
        vocab_size, hidden_size = self.embedding.shape
        if not self.config.tie_word_embeddings:
            return self.backend.head(weights.matrix({"lm_head.weight": vocab_size}, hidden_size))
        if "lm_head.weight" in weights:  # some exports write the tied head once more
            again = weights.take("lm_head.weight", *self.embedding.shape)
            if not torch.equal(again.to(self.embedding), self.embedding):
                raise CheckpointError(
                    f"{weights.folder}: lm_head.weight differs from model.embed_tokens.weight, yet config.json sets "
                    "tie_word_embeddings"
                )
        tied = Matrix("lm_head.weight", vocab_size, hidden_size, lambda: self.embedding, is_kept=True)
        return self.backend.head(tied)

    @property
    def shape(self) -> TextShape:
        return TextShape(
            vocab_size=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            max_position_embeddings=self.config.max_position_embeddings,
        )

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        """One step over packed tokens; float32 logits [L, vocab] of `batch.logits_rows`."""
        x = F.embedding(batch.ids, self.embedding).to(self.backend.activation_dtype)
        for item in batch.embeddings:
            x[item.start : item.start + len(item.rows)] = item.rows
        cos, sin = mrope_cos_sin(batch.positions, self.frequencies, self.config.mrope_section)
        caches = list(zip(kv.keys, kv.values, strict=True))
        for layer, cache in zip(self.layers[:-1], caches[:-1], strict=True):
            x = layer.forward(x, cos, sin, batch, cache)
        # the last layer owes K and V of all rows to the cache, but only the wanted rows go on from its attention
        x = self.layers[-1].forward(x, cos, sin, batch, caches[-1], rows=batch.logits_rows)
        return self.head(self.backend.ops.rms_norm(x, self.norm, self.config.rms_norm_eps)).float()


class _Layer:
    def __init__(self, config: TextConfig, index: int, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.ops = backend.ops
        prefix = f"model.layers.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = tuple(f"{prefix}.self_attn.{x}_proj" for x in "qkv")
        sizes = (query, key, key)
        qkv = weights.matrix({f"{name}.weight": size for name, size in zip(attention, sizes, strict=True)}, hidden)
        bias = weights.join(tuple(f"{name}.bias" for name in attention), sizes)
        self.qkv = backend.linear(qkv, bias)
        self.out = backend.linear(weights.matrix({f"{prefix}.self_attn.o_proj.weight": hidden}, query))
        mlp = {f"{prefix}.mlp.gate_proj.weight": inner, f"{prefix}.mlp.up_proj.weight": inner}
        self.gate_up = backend.linear(weights.matrix(mlp, hidden), epilogue="silu_mul")
        self.down = backend.linear(weights.matrix({f"{prefix}.mlp.down_proj.weight": hidden}, inner))
        self.norm1 = backend.vector(weights.take(f"{prefix}.input_layernorm.weight", hidden))
        self.norm2 = backend.vector(weights.take(f"{prefix}.post_attention_layernorm.weight", hidden))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: StepBatch,
        cache: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], or [L, hidden] of `rows` alone."""
        eps = self.config.rms_norm_eps
        attended = self._attention(self.ops.rms_norm(x, self.norm1, eps), cos, sin, batch, cache)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        x = self.out(attended, residual=x)
        return self.down(self.gate_up(self.ops.rms_norm(x, self.norm2, eps)), residual=x)

    def _attention(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: StepBatch,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        heads = self.qkv(x).view(len(x), -1, c.head_dim)
        q, k, v = heads.split_with_sizes([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        self.ops.rope_write_kv(q, k, v, cos, sin, *cache, batch.slots)
        out = self.ops.paged_attention(
            q, *cache, batch.block_tables, batch.query_starts, batch.context_lens, c.head_dim**-0.5
        )
        return out.flatten(1)
