"""A head that guesses the token after the next: multi-token prediction (Gloeckle et al. 2024), as DeepSeek-V3 has it
and Qwen3.5 and Qwen3-Next are published with it. transformers leaves it out; the order of its parts is that of vLLM.
"""

from __future__ import annotations

import torch

from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.linear import whole
from dashinfer_vlm.models.attention import Cache, Table
from dashinfer_vlm.models.base import StepBatch
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.layer import Layer
from dashinfer_vlm.models.weights import Weights

__all__ = ["DRAFT_LAYER", "DRAFT_TENSOR", "DraftHead"]

DRAFT_LAYER = "mtp.layers.0"
"""Attends, and is otherwise built as the model's own."""
DRAFT_TENSOR = "mtp.fc.weight"
"""Whose presence tells that there is one."""


class DraftHead:
    """From the states of tokens in front of the model's head, and the token that follows each, to what the head takes
    for the token behind that. Takes `mtp.*` but for the layer, which is given."""

    def __init__(self, config: TextConfig, weights: Weights, backend: Backend, layer: Layer) -> None:
        hidden, self._eps, self._ops = config.hidden_size, config.rms_norm_eps, backend.ops
        self.layer = layer
        self.joined = backend.linear(weights.matrix({DRAFT_TENSOR: hidden}, 2 * hidden))
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        gains = (weights.take(f"mtp.{name}.weight", hidden).float() + config.norm_offset for name in names)
        self._of_tokens, self._of_states, self._last = map(backend.vector, gains)

    def forward(
        self,
        embedded: torch.Tensor,
        states: torch.Tensor,
        table: Table,
        batch: StepBatch,
        cache: Cache,
    ) -> torch.Tensor:
        """[L, hidden] of `batch.logits_rows`. `embedded` [T, hidden] are the tokens that follow, `states` [T, hidden]
        have passed the model's last norm; positions and slots are those of the states."""
        halves = self._normed(embedded, self._of_tokens), self._normed(states, self._of_states)
        x = self.layer.forward(self.joined(torch.cat(halves, dim=1)), table, batch, cache, rows=batch.logits_rows)
        return self._normed(whole(x), self._last)

    def _normed(self, x: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, gains, self._eps)
