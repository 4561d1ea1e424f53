"""Qwen2, Qwen2.5 and Qwen3 without eyes (Yang et al. 2024 and 2025), Qwen3 also as a mixture of experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dashinfer_vlm.models.config import CheckpointConfig, MixtureConfig, TextConfig, read_mixture, read_text
from dashinfer_vlm.models.family import Family, Names, ScorePrompt, refuse_attention_bias
from dashinfer_vlm.models.published import Scoring
from dashinfer_vlm.models.rope import read_rope
from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen2", "Qwen3", "Qwen3Classifier", "Qwen3Moe"]


class Qwen2(Family):
    """Biased queries, keys and values."""

    def text(self, section: Section, root: Section) -> TextConfig:
        return read_text(section, root, read_rope(section))

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import Attention
        from dashinfer_vlm.models.decoder import Decoder

        return Decoder(config.text, weights, backend, attention=partial(Attention, qkv_bias=True))


class Qwen3(Family):
    """No bias, but a norm over each head of queries and keys."""

    score_prompt = ScorePrompt(  # of Qwen3-Reranker's script
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        query="\n<Query>: ",
        document="\n<Document>: ",
        opening="<think>\n\n</think>\n\n",
    )

    def text(self, section: Section, root: Section) -> TextConfig:
        refuse_attention_bias(section)
        return read_text(section, root, read_rope(section), self.mixture(section))

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import Attention
        from dashinfer_vlm.models.decoder import Decoder

        return Decoder(config.text, weights, backend, attention=partial(Attention, qk_norm=True))


class Qwen3Classifier(Qwen3):
    """As Qwen3, with one row in place of a head: Qwen3-Reranker as `sentence-transformers` likes it."""

    names = Names(parts={"text": ("model.", "score.")})
    scoring = Scoring("score.weight", yes=0)


class Qwen3Moe(Qwen3):
    """As Qwen3, with experts in place of the MLP of most layers."""

    def mixture(self, section: Section) -> MixtureConfig:
        return read_mixture(section, is_normalised=section.boolean("norm_topk_prob", False))
