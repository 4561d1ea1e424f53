"""Qwen3-VL: a ViT with learnt positions whose middle layers feed the first layers of a Qwen3 text model, and videos as
pictures with the time written between them (Bai et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dashinfer_vlm.models.config import CheckpointConfig, TextConfig, VisionConfig, read_text
from dashinfer_vlm.models.family import (
    Expansion,
    LoadedItem,
    NormalisedExperts,
    Run,
    ScorePrompt,
    TransformersTower,
    VectorPrompt,
    VisionFamily,
    read_vision,
    refuse_attention_bias,
)
from dashinfer_vlm.models.rope import read_mrope
from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.base import VisionEncoder
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen3VL", "Qwen3VLMoe"]

REPLACES_FRAME = True
"""Whether a video's runs replace the vision start and end tokens around the template's placeholder, as `transformers`
4.57 did, with which Qwen3-VL was published; 5 leaves an outer pair around all of them."""


class Qwen3VL(VisionFamily):
    """See `models.family`."""

    box_unit = "thousandths"
    tower = TransformersTower("qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionModel")
    vector_prompt = VectorPrompt(instruction="Represent the user's input.")  # of Qwen3-VL-Embedding's own script
    score_prompt = ScorePrompt(  # of Qwen3-VL-Reranker's, which has no break in front of the query
        instruction="Given a search query, retrieve relevant candidates that answer the query.",
        query="<Query>:",
        document="\n<Document>:",
    )

    def text(self, section: Section, root: Section) -> TextConfig:
        refuse_attention_bias(section)
        text = read_text(section, root, read_mrope(section, interleaved=True), self.mixture(section))
        if len(_deepstack(root.section("vision_config"))) >= text.num_layers:
            raise section.error(
                "num_hidden_layers", f"is {text.num_layers}; deepstack needs one layer more than it has"
            )
        return text

    def vision(self, root: Section, text: TextConfig, folder: Path) -> VisionConfig:
        section = root.section("vision_config")
        section.choice("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        vision = read_vision(section, text, folder, width="hidden_size", out_size="out_hidden_size")
        if max(_deepstack(section), default=0) >= vision.depth:
            indexes = list(_deepstack(section))
            raise section.error("deepstack_visual_indexes", f"is {indexes}; the ViT has {vision.depth} blocks")
        _table_side(section)
        return vision

    def embedding_size(self, config: CheckpointConfig) -> int:
        """Merged rows, and as many columns again for each layer of deepstack."""
        assert config.vision
        return config.text.hidden_size * (1 + len(_deepstack(config.vision.section)))

    def expand(self, config: CheckpointConfig, item: LoadedItem, encode: Callable[[str], list[int]]) -> Expansion:
        """A video is a run for each temporal step, with its time in front. Source: Qwen3VLProcessor."""
        if item.kind != "video":
            return super().expand(config, item, encode)
        start, end = (config.root.integer(f"vision_{x}_token_id") for x in ("start", "end"))
        stamps = [f"<{seconds:.1f} seconds>" for seconds in item.timestamps]
        num_tokens = item.num_tokens // len(stamps)
        pieces: list[int | Run] = []
        for i, stamp in enumerate(stamps):
            pieces += [*(encode(stamp) if i else ()), start, Run(i * num_tokens, num_tokens), end]
        return Expansion(pieces=tuple(pieces), lead=stamps[0], around=(start, end) if REPLACES_FRAME else None)

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import Attention
        from dashinfer_vlm.models.decoder import Decoder

        assert config.vision
        num_layers = len(_deepstack(config.vision.section))
        return Decoder(config.text, weights, backend, attention=partial(Attention, qk_norm=True), deepstack=num_layers)

    def encoder(self, config: VisionConfig, weights: Weights, backend: Backend) -> VisionEncoder:
        from dashinfer_vlm.models.vit import Mlp, PackedVit, PatchMerger, VitBlock
        from dashinfer_vlm.models.vit_embed import PatchEmbedding, PositionTable
        from dashinfer_vlm.models.vit_layout import frames_layout
        from dashinfer_vlm.models.vit_norms import LayerNorm

        width, inner = config.width, config.section.integer("intermediate_size")
        norm = partial(LayerNorm, weights=weights, backend=backend)

        def block(prefix: str) -> VitBlock:
            names = (f"{prefix}.mlp.linear_fc1", f"{prefix}.mlp.linear_fc2")
            mlp = Mlp(names, width, inner, weights, backend, act="gelu_tanh")
            norms = (norm(f"{prefix}.norm1", width), norm(f"{prefix}.norm2", width))
            return VitBlock(prefix, config, weights, backend, norms=norms, mlp=mlp)

        def merger(prefix: str, *, norm_group: bool) -> PatchMerger:
            names = (f"{prefix}.linear_fc1", f"{prefix}.linear_fc2")
            before = norm(f"{prefix}.norm", width * config.merge_size**2 if norm_group else width)
            return PatchMerger(names, config, weights, backend, norm=before, norm_group=norm_group)

        deepstack = enumerate(_deepstack(config.section))
        return PackedVit(
            config,
            backend,
            embed=PatchEmbedding(config, weights, backend, has_bias=True),
            blocks=[block(f"visual.blocks.{i}") for i in range(config.depth)],
            merger=merger("visual.merger", norm_group=False),
            layout=frames_layout(backend.device),
            table=PositionTable("visual.pos_embed", _table_side(config.section), width, weights, backend),
            deepstack={k: merger(f"visual.deepstack_merger_list.{i}", norm_group=True) for i, k in deepstack},
        )


class Qwen3VLMoe(NormalisedExperts, Qwen3VL):
    """As Qwen3-VL, with experts in place of the MLP of each layer of the text model."""

    tower = TransformersTower("qwen3_vl_moe.modeling_qwen3_vl_moe", "Qwen3VLMoeVisionModel")


def _deepstack(section: Section) -> tuple[int, ...]:
    """Blocks of the ViT whose output feeds the text model's layers, from the first on."""
    indexes = section.integers("deepstack_visual_indexes") if section.values.get("deepstack_visual_indexes") else ()
    if list(indexes) != sorted(set(indexes)):
        raise section.error("deepstack_visual_indexes", f"is {list(indexes)}; each must be above the one before")
    return indexes


def _table_side(section: Section) -> int:
    """Positions along one side of the learnt table."""
    count = section.integer("num_position_embeddings")
    if math.isqrt(count) ** 2 != count:
        raise section.error("num_position_embeddings", f"is {count}; it must be a square")
    return math.isqrt(count)
