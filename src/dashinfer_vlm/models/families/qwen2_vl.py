"""Qwen2-VL: a ViT with LayerNorm and QuickGELU in front of the Qwen2 text model (Wang et al. 2024)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dashinfer_vlm.models.config import CheckpointConfig, TextConfig, VisionConfig, read_text
from dashinfer_vlm.models.family import TransformersTower, VectorPrompt, VisionFamily, read_vision
from dashinfer_vlm.models.rope import read_mrope
from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.base import VisionEncoder
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen2VL"]


class Qwen2VL(VisionFamily):
    """See `models.family`."""

    tower = TransformersTower("qwen2_vl.modeling_qwen2_vl", "Qwen2VisionTransformerPretrainedModel")
    vector_prompt = VectorPrompt(end="<|endoftext|>")  # of gme-Qwen2-VL and DSE-Qwen2, says their own code

    def text(self, section: Section, root: Section) -> TextConfig:
        return read_text(section, root, read_mrope(section))

    def vision(self, root: Section, text: TextConfig, folder: Path) -> VisionConfig:
        section = root.section("vision_config")
        section.choice("hidden_act", ("quick_gelu",), "quick_gelu")
        return read_vision(section, text, folder, width="embed_dim", out_size="hidden_size")

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import Attention
        from dashinfer_vlm.models.decoder import Decoder

        return Decoder(config.text, weights, backend, attention=partial(Attention, qkv_bias=True))

    def encoder(self, config: VisionConfig, weights: Weights, backend: Backend) -> VisionEncoder:
        from dashinfer_vlm.models.vit import Mlp, PackedVit, PatchMerger, VitBlock
        from dashinfer_vlm.models.vit_embed import PatchEmbedding
        from dashinfer_vlm.models.vit_layout import frames_layout
        from dashinfer_vlm.models.vit_norms import LayerNorm

        width = config.width
        inner = int(width * config.section.number("mlp_ratio"))
        norm = partial(LayerNorm, width=width, weights=weights, backend=backend)

        def block(prefix: str) -> VitBlock:
            names = (f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2")
            mlp = Mlp(names, width, inner, weights, backend, act="quick_gelu")
            norms = (norm(f"{prefix}.norm1"), norm(f"{prefix}.norm2"))
            return VitBlock(prefix, config, weights, backend, norms=norms, mlp=mlp)

        merger = ("visual.merger.mlp.0", "visual.merger.mlp.2")
        return PackedVit(
            config,
            backend,
            embed=PatchEmbedding(config, weights, backend),
            blocks=[block(f"visual.blocks.{i}") for i in range(config.depth)],
            merger=PatchMerger(merger, config, weights, backend, norm=norm("visual.merger.ln_q")),
            layout=frames_layout(backend.device),
        )
