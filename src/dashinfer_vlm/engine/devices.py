"""What an engine does differently on a processor and on a card: chosen once, from the model's device."""

from __future__ import annotations

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.cards.graphs import Shapes
from dashinfer_vlm.engine.cards.runner import CardRunner
from dashinfer_vlm.engine.cost import CardCost, StepCost
from dashinfer_vlm.engine.runner import Runner
from dashinfer_vlm.engine.steps import StepRunner
from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.models.base import KVCache, Model

__all__ = ["first_cost", "make_card_runner", "make_runner", "max_batched_tokens", "num_spare_blocks"]

_MAX_BATCHED_TOKENS = {"cpu": 512, "cuda": 2048}
"""Of one step. A card is busy with fewer rows for little more than the time that it takes to start them."""


def make_runner(model: Model, kv: KVCache, embeddings: EmbeddingCache, config: EngineConfig) -> StepRunner:
    if model.device.type != "cuda":
        return Runner(model, kv, embeddings)
    return make_card_runner(model, kv, embeddings, config, with_graphs=cuda.why_unavailable() is None)


def make_card_runner(
    model: Model,
    kv: KVCache,
    embeddings: EmbeddingCache,
    config: EngineConfig,
    *,
    with_graphs: bool = True,
    depth: int = 1,
) -> CardRunner:
    """With `depth` 0 nothing is under way while a step is planned. Graphs need the kernels: plain torch waits for the
    device within a step."""
    max_rows = max(max_batched_tokens(config, model.device), config.max_num_seqs)
    runner = CardRunner(model, kv, embeddings, config, Shapes(config.max_num_seqs, max_rows), depth=depth)
    if with_graphs:
        runner.capture()
    return runner


def num_spare_blocks(device: torch.device) -> int:
    """Of a cache, beyond those for sequences."""
    return 1 if device.type == "cuda" else 0


def first_cost(device: torch.device) -> StepCost:
    """Where the estimate of a step's cost starts; a few steps of real work replace it."""
    if device.type == "cuda":
        return CardCost(fixed_s=0.005, token_s=0.00002)
    return StepCost(fixed_s=0.02, token_s=0.001)


def max_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    return config.max_num_batched_tokens or _MAX_BATCHED_TOKENS[device.type]
