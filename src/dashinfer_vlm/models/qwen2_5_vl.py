"""Qwen2.5-VL: a ViT with RMSNorm, SwiGLU and attention in windows, in front of the Qwen2 text model (Bai et al. 2025)."""

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

__all__ = ["Qwen25VL", "Qwen25VLVision"]

FRAMES, WINDOWS = 0, 1
"""Which segmentation of the layout a block attends in."""


class Qwen25VL:
    """See `models.base.Model`."""

    def __init__(self, config: CheckpointConfig, weights: Weights, backend: Backend, encoder: VisionEncoder) -> None:
        self.config = config
        self.tokens_per_second = config.vision.section.number("tokens_per_second")
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
        return mrope_positions(num_tokens, items, merge_size=merge_size, tokens_per_second=self.tokens_per_second)


class Qwen25VLVision(PackedVit):
    """The ViT. Takes every `visual.*` tensor."""

    def __init__(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> None:
        section = config.vision.section
        width = section.integer("hidden_size")
        super().__init__(config, width, "out_hidden_size", weights, backend)
        section.choice("hidden_act", ("silu",), "silu")
        self.window = section.integer("window_size") // (config.vision.merge_size * config.vision.patch_size)
        if self.window < 1:
            raise section.error("window_size", f"is {section.integer('window_size')}, less than one merged token")
        full = section.integers("fullatt_block_indexes")
        if max(full, default=0) >= config.vision.depth:
            raise section.error("fullatt_block_indexes", f"is {list(full)}; the ViT has {config.vision.depth} blocks")
        self.blocks = [
            _Block(i, FRAMES if i in full else WINDOWS, width, config, weights, backend)
            for i in range(config.vision.depth)
        ]
        self.merger_norm = backend.vector(weights.take("visual.merger.ln_q.weight", width))

    def layout(self, grids: Sequence[Grid]) -> PatchLayout:
        """Tokens of a window stand together, so that its attention is a segment like any other."""
        m = self.config.merge_size
        windows = [_windows(frames, rows // m, columns // m, self.window) for frames, rows, columns in grids]
        sizes = [0, *(frames * rows * columns // m**2 for frames, rows, columns in grids)]
        firsts = torch.tensor(sizes).cumsum(0).tolist()
        order = torch.cat([item_order + first for (item_order, _), first in zip(windows, firsts, strict=False)])
        lengths = torch.cat([torch.zeros(1, dtype=torch.int64), *(lengths for _, lengths in windows)]) * m**2
        device = self.backend.device
        starts = (frame_starts(grids, device), lengths.cumsum(0).int().to(device))
        return PatchLayout(starts=starts, order=order.to(device))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.ops.rms_norm(x, self.merger_norm, NORM_EPS)


def _windows(frames: int, rows: int, columns: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For an item of merged tokens: their indices window by window (int64), and how many each window holds.

    Windows of `window` by `window` tokens tile each frame from its top left; those at the right and bottom edges hold
    what is left.
    """
    across = -(-columns // window)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    which = (row // window * across + column // window).flatten()
    order, lengths = which.argsort(stable=True), which.bincount()
    firsts = torch.arange(frames)[:, None] * (rows * columns)
    return (firsts + order).flatten(), lengths.repeat(frames)


class _Block(VitBlock):
    def __init__(
        self, index: int, segments: int, width: int, config: CheckpointConfig, weights: Weights, backend: Backend
    ) -> None:
        prefix = f"visual.blocks.{index}"
        super().__init__(prefix, width, config.vision.num_heads, weights, backend)
        self.starts_index = segments
        inner = config.vision.section.integer("intermediate_size")
        self.before_attention = backend.vector(weights.take(f"{prefix}.norm1.weight", width))
        self.before_mlp = backend.vector(weights.take(f"{prefix}.norm2.weight", width))
        mlp = tuple(f"{prefix}.mlp.{x}_proj" for x in ("gate", "up"))
        gate_up = weights.matrix({f"{name}.weight": inner for name in mlp}, width)
        bias = weights.join(tuple(f"{name}.bias" for name in mlp), (inner, inner))
        self.gate_up = backend.linear(gate_up, bias, epilogue="silu_mul")
        self.down = take_linear(f"{prefix}.mlp.down_proj", inner, width, weights, backend)

        self.mlp_size = 3 * width * inner

    def norm1(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.before_attention, NORM_EPS)

    def mlp(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.down(self.gate_up(self.ops.rms_norm(x, self.before_mlp, NORM_EPS)), residual=x, out=out)
