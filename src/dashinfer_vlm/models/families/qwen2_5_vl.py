"""Qwen2.5-VL: a ViT with RMSNorm, SwiGLU and attention in windows, in front of the Qwen2 text model (Bai et al.
2025)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dashinfer_vlm.models.config import CheckpointConfig, TextConfig, VisionConfig, read_text
from dashinfer_vlm.models.family import TransformersTower, VisionFamily, read_vision
from dashinfer_vlm.models.mrope import mrope_positions
from dashinfer_vlm.models.rope import read_mrope
from dashinfer_vlm.models.section import Section
from dashinfer_vlm.request import Item

if TYPE_CHECKING:
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.base import VisionEncoder
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen25VL"]

FRAMES, WINDOWS = 0, 1
"""Which segmentation of the layout a block attends in."""


class Qwen25VL(VisionFamily):
    """See `models.family`."""

    tower = TransformersTower("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel")

    def text(self, section: Section, root: Section) -> TextConfig:
        return read_text(section, root, read_mrope(section))

    def vision(self, root: Section, text: TextConfig, folder: Path) -> VisionConfig:
        section = root.section("vision_config")
        section.choice("hidden_act", ("silu",), "silu")
        vision = read_vision(section, text, folder, width="hidden_size", out_size="out_hidden_size")
        section.number("tokens_per_second")
        if section.integer("window_size") < vision.merge_size * vision.patch_size:
            raise section.error("window_size", f"is {section.integer('window_size')}, less than one merged token")
        full = section.integers("fullatt_block_indexes")
        if max(full, default=0) >= vision.depth:
            raise section.error("fullatt_block_indexes", f"is {list(full)}; the ViT has {vision.depth} blocks")
        return vision

    def positions(self, config: CheckpointConfig, num_tokens: int, items: Sequence[Item]) -> tuple[np.ndarray, int]:
        """The temporal axis of a video advances with its seconds."""
        assert config.vision
        rate = config.vision.section.number("tokens_per_second")
        return mrope_positions(num_tokens, items, merge_size=config.merge_size, tokens_per_second=rate)

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import Attention
        from dashinfer_vlm.models.decoder import Decoder

        return Decoder(config.text, weights, backend, attention=partial(Attention, qkv_bias=True))

    def encoder(self, config: VisionConfig, weights: Weights, backend: Backend) -> VisionEncoder:
        from dashinfer_vlm.models.vit import GatedMlp, PackedVit, PatchMerger, VitBlock
        from dashinfer_vlm.models.vit_embed import PatchEmbedding
        from dashinfer_vlm.models.vit_layout import windows_layout
        from dashinfer_vlm.models.vit_norms import RmsNorm

        width, section = config.width, config.section
        inner, full = section.integer("intermediate_size"), section.integers("fullatt_block_indexes")
        norm = partial(RmsNorm, width=width, weights=weights, backend=backend)

        def block(index: int, prefix: str) -> VitBlock:
            mlp = GatedMlp(f"{prefix}.mlp", width, inner, weights, backend)
            norms = (norm(f"{prefix}.norm1"), norm(f"{prefix}.norm2"))
            starts = FRAMES if index in full else WINDOWS
            return VitBlock(prefix, config, weights, backend, norms=norms, mlp=mlp, starts_index=starts)

        merger = ("visual.merger.mlp.0", "visual.merger.mlp.2")
        window = section.integer("window_size") // (config.merge_size * config.patch_size)
        return PackedVit(
            config,
            backend,
            embed=PatchEmbedding(config, weights, backend),
            blocks=[block(i, f"visual.blocks.{i}") for i in range(config.depth)],
            merger=PatchMerger(merger, config, weights, backend, norm=norm("visual.merger.ln_q")),
            layout=windows_layout(config, window, backend.device),
        )
