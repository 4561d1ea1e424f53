"""What an engine does differently on a processor and on a card: chosen once, from the model's device."""

from __future__ import annotations

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.cost import CardCost, StepCost
from dashinfer_vlm.engine.runner import Runner
from dashinfer_vlm.engine.steps import StepRunner
from dashinfer_vlm.models.base import KVCache, Model

__all__ = ["first_cost", "make_runner", "max_batched_tokens"]

_MAX_BATCHED_TOKENS = {"cpu": 512, "cuda": 2048}
"""Of one step. A card is busy with fewer rows for little more than the time that it takes to start them."""


def make_runner(model: Model, kv: KVCache, embeddings: EmbeddingCache, config: EngineConfig) -> StepRunner:
    return Runner(model, kv, embeddings)


def first_cost(device: torch.device) -> StepCost:
    """Where the estimate of a step's cost starts; a few steps of real work replace it."""
    if device.type == "cuda":
        return CardCost(fixed_s=0.005, token_s=0.00002)
    return StepCost(fixed_s=0.02, token_s=0.001)


def max_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    return config.max_num_batched_tokens or _MAX_BATCHED_TOKENS[device.type]
