"""What an engine does differently on a processor and on a card: chosen once, from the model's device."""

from __future__ import annotations

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.cards.calls import Followers
from dashinfer_vlm.engine.cards.graphs import Shapes
from dashinfer_vlm.engine.cards.runner import CardRunner
from dashinfer_vlm.engine.cost import CardCost, StepCost
from dashinfer_vlm.engine.runner import Runner
from dashinfer_vlm.engine.steps import StepRunner
from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.models.base import KVCache, Model

__all__ = [
    "captures_graphs",
    "first_cost",
    "make_card_runner",
    "make_runner",
    "max_batched_tokens",
    "num_spare_blocks",
    "step_shapes",
]

_MAX_BATCHED_TOKENS = {"cpu": 512, "cuda": 2048}
"""Of one step. A card is busy with fewer rows for little more than the time that it takes to start them."""


def make_runner(
    model: Model, kv: KVCache, embeddings: EmbeddingCache, config: EngineConfig, followers: Followers | None = None
) -> StepRunner:
    """With `followers`, one whose model calls they make as well."""
    if model.device.type != "cuda" and followers is None:
        return Runner(model, kv, embeddings, num_guesses=config.num_head_guesses)
    return make_card_runner(
        model,
        kv,
        embeddings,
        config,
        followers,
        with_graphs=captures_graphs(model),
        depth=int(model.device.type == "cuda"),
    )


def captures_graphs(model: Model) -> bool:
    """Graphs need the kernels: plain torch waits for the device within a step."""
    return model.device.type == "cuda" and cuda.why_unavailable() is None


def step_shapes(model: Model, config: EngineConfig) -> Shapes:
    """What steps are padded to; on a processor, to nothing."""
    max_rows = max(max_batched_tokens(config, model.device), config.max_num_seqs)
    if model.device.type == "cpu":
        return Shapes(config.max_num_seqs, max_rows, decode_sizes=(), mixed_sizes=())
    return Shapes(config.max_num_seqs, max_rows)


def make_card_runner(
    model: Model,
    kv: KVCache,
    embeddings: EmbeddingCache,
    config: EngineConfig,
    followers: Followers | None = None,
    *,
    with_graphs: bool = True,
    depth: int = 1,
) -> CardRunner:
    """With `depth` 0 nothing is under way while a step is planned."""
    shapes = step_shapes(model, config)
    runner = CardRunner(model, kv, embeddings, config, shapes, depth=depth, followers=followers)
    if with_graphs:
        runner.capture()
    return runner


def num_spare_blocks(device: torch.device, num_ranks: int = 1) -> int:
    """Of a cache, beyond those for sequences: where padding goes."""
    return 1 if device.type == "cuda" or num_ranks > 1 else 0


def first_cost(model: Model, config: EngineConfig) -> StepCost:
    """Where the estimate of a step's cost starts; a few steps of real work replace it."""
    if model.device.type == "cuda":
        shapes = step_shapes(model, config)
        decode, mixed = (tuple(shape.num_rows for shape in found) for found in (shapes.decode, shapes.mixed))
        return CardCost(fixed_s=0.005, token_s=0.00002, decode_sizes=decode, mixed_sizes=mixed)
    return StepCost(fixed_s=0.02, token_s=0.001)


def max_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    return config.max_num_batched_tokens or _MAX_BATCHED_TOKENS[device.type]
