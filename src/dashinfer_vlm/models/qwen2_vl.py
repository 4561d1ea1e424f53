"""Qwen2-VL: a ViT with LayerNorm and QuickGELU in front of the Qwen2 text model (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.models.base import KVCache, StepBatch, VisionEncoder
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.mrope import mrope_positions
from dashinfer_vlm.models.qwen2_decoder import Qwen2Decoder
from dashinfer_vlm.models.vit import NORM_EPS, PackedVit, PatchLayout, VitBlock, frame_starts, take_linear
from dashinfer_vlm.models.weights import Weights
from dashinfer_vlm.request import Grid, Item

__all__ = ["Qwen2VL", "Qwen2VLVision"]


class Qwen2VL:
    """See `models.base.Model`."""

    def __init__(self, config: CheckpointConfig, weights: Weights, backend: Backend, encoder: VisionEncoder) -> None:
        self.config = config
        self.eos_token_ids = config.eos_token_ids
        self.device = backend.device
        self.kv_dtype = backend.weight_dtype
        self.activation_dtype = backend.activation_dtype
        self.encoder = encoder
        self.decoder = Qwen2Decoder(config.text, weights, backend)
        self.text = self.decoder.shape

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        """Run the text model over the step; float32 logits [L, vocab]."""
        with torch.no_grad():
            return self.decoder.forward(batch, kv)

    def positions(self, num_tokens: int, items: Sequence[Item]) -> tuple[torch.Tensor, int]:
        """M-RoPE positions of a prompt and the offset of what is generated."""
        merge_size = self.config.vision.merge_size
        return mrope_positions(num_tokens, items, merge_size=merge_size, tokens_per_second=None)


class Qwen2VLVision(PackedVit):
    """The ViT. Takes every `visual.*` tensor."""

    def __init__(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> None:
        section = config.vision.section
        width = section.integer("embed_dim")
        super().__init__(config, width, "hidden_size", weights, backend)
        inner = int(width * section.number("mlp_ratio"))
        section.choice("hidden_act", ("quick_gelu",), "quick_gelu")
        self.blocks = [_Block(i, width, inner, config, weights, backend) for i in range(config.vision.depth)]
        self.merger_norm = _LayerNorm("visual.merger.ln_q", width, weights, backend)

    def layout(self, grids: Sequence[Grid]) -> PatchLayout:
        return PatchLayout(starts=(frame_starts(grids, self.backend.device),))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.merger_norm(x)


class _Block(VitBlock):
    def __init__(
        self, index: int, width: int, inner: int, config: CheckpointConfig, weights: Weights, backend: Backend
    ) -> None:
        prefix = f"visual.blocks.{index}"
        super().__init__(prefix, width, config.vision.num_heads, weights, backend)
        self.before_attention = _LayerNorm(f"{prefix}.norm1", width, weights, backend)
        self.before_mlp = _LayerNorm(f"{prefix}.norm2", width, weights, backend)
        self.up = take_linear(f"{prefix}.mlp.fc1", width, inner, weights, backend, epilogue="quick_gelu")
        self.down = take_linear(f"{prefix}.mlp.fc2", inner, width, weights, backend)

        self.mlp_size = 2 * width * inner

    def norm1(self, x: torch.Tensor) -> torch.Tensor:
        return self.before_attention(x)

    def mlp(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.down(self.up(self.before_mlp(x)), residual=x, out=out)


class _LayerNorm:
    def __init__(self, name: str, width: int, weights: Weights, backend: Backend) -> None:
        self.ops = backend.ops
        self.weight = backend.vector(weights.take(f"{name}.weight", width))
        self.bias = backend.vector(weights.take(f"{name}.bias", width))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, NORM_EPS)
