"""What leaves the text model in place of logits: a state's vector, or the score of a pair."""

from __future__ import annotations

import torch

from dashinfer_vlm.layers.norm import rms_norm
from dashinfer_vlm.models.config import TextConfig
from dashinfer_vlm.models.published import HEAD
from dashinfer_vlm.models.weights import Weights

__all__ = ["ReadOut"]


class ReadOut:
    """The last norm, in float32: the head's own may be rounded as its product takes it. Where pairs are scored, a
    product behind it, whose row is the checkpoint's however the head is quantised and shared."""

    def __init__(self, gains: torch.Tensor, embedding: torch.Tensor, config: TextConfig, weights: Weights) -> None:
        """`gains` are float32 [hidden], `embedding` is the table of words on the device that computes. Takes the matrix
        of `config.scoring`, unless it is the head."""
        device = embedding.device
        self._gains = gains.to(device, torch.float32, copy=True)
        self._eps = config.rms_norm_eps
        row = _score_row(embedding, config, weights)
        self._row = None if row is None else row.to(device, torch.float32, copy=True)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[n, hidden] behind the last layer -> float32 [n, hidden], or [n, 1] of pairs."""
        normed = rms_norm(states.float(), self._gains, self._eps)
        return normed if self._row is None else (normed * self._row).sum(-1, keepdim=True)


def _score_row(embedding: torch.Tensor, config: TextConfig, weights: Weights) -> torch.Tensor | None:
    """[hidden]."""
    scoring = config.scoring
    if scoring is None:
        return None
    if scoring.no is None:
        return weights.take(scoring.matrix, 1, config.hidden_size)[scoring.yes]
    tied = config.tie_word_embeddings and scoring.matrix == HEAD
    matrix = embedding if tied else weights.look(scoring.matrix)
    return matrix[scoring.yes].float() - matrix[scoring.no].float()
