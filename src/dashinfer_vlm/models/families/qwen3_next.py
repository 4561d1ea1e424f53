"""Qwen3-Next and Qwen3-Coder-Next, the forerunners of Qwen3.5's mixtures: the same text model, but that all rows of a
layer with states which belong to one key head lie together.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dashinfer_vlm.models.config import CheckpointConfig, MixtureConfig, read_mixture
from dashinfer_vlm.models.families.qwen3_5 import Qwen35Text
from dashinfer_vlm.models.family import Family
from dashinfer_vlm.models.section import Section

if TYPE_CHECKING:
    from dashinfer_vlm.layers.backend import Backend
    from dashinfer_vlm.models.decoder import Decoder
    from dashinfer_vlm.models.weights import Weights

__all__ = ["Qwen3Next"]


class Qwen3Next(Qwen35Text):
    """Experts in place of the MLP of most layers, one of which all rows share."""

    names = replace(Family.names, ignored=Qwen35Text.names.ignored)

    def mixture(self, section: Section) -> MixtureConfig:
        return read_mixture(section, is_normalised=section.boolean("norm_topk_prob", True))

    def decoder(self, config: CheckpointConfig, weights: Weights, backend: Backend) -> Decoder:
        from dashinfer_vlm.models.attention import GatedAttention
        from dashinfer_vlm.models.decoder import Decoder
        from dashinfer_vlm.models.delta_net import InterleavedDeltaNet

        attention = partial(GatedAttention, qk_norm=True)
        return Decoder(config.text, weights, backend, attention=attention, delta_net=InterleavedDeltaNet)
