"""A loaded model of any family, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.models.base import KVCache, StepBatch, VisionEncoder
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.decoder import Decoder
from dashinfer_vlm.request import Item

__all__ = ["LoadedModel"]


class LoadedModel:
    """See `models.base.Model`."""

    def __init__(
        self, config: CheckpointConfig, decoder: Decoder, encoder: VisionEncoder | None, backend: Backend
    ) -> None:
        """`backend` is the decoder's."""
        self.config = config
        self.decoder = decoder
        self.encoder = encoder
        self.text = decoder.shape
        self.embedding_size = config.embedding_size
        self.eos_token_ids = config.eos_token_ids
        self.device = backend.device
        self.kv_dtype = backend.weight_dtype
        self.activation_dtype = backend.activation_dtype
        self.ranks = backend.ranks

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        """Run the text model over the step; float32 logits [L, vocab]."""
        with torch.no_grad():
            return self.decoder.forward(batch, kv)

    def forward_with_vectors(self, batch: StepBatch, kv: KVCache, num_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the normed final states, or scores, of the rows behind the first `num_logits`."""
        with torch.no_grad():
            return self.decoder.forward_with_vectors(batch, kv, num_logits)

    def forward_with_states(
        self, batch: StepBatch, kv: KVCache, num_logits: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `models.base.GuessingModel`."""
        with torch.no_grad():
            return self.decoder.forward_with_states(batch, kv, num_logits)

    def guess(self, batch: StepBatch, states: torch.Tensor, kv: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """See `models.base.GuessingModel`."""
        with torch.no_grad():
            return self.decoder.guess(batch, states, kv)

    def positions(self, num_tokens: int, items: Sequence[Item]) -> tuple[torch.Tensor, int]:
        """M-RoPE positions of a prompt and the offset of what is generated."""
        positions, offset = self.config.family.positions(self.config, num_tokens, items)
        return torch.from_numpy(positions), offset
