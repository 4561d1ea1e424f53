"""The runner for cards on a processor: graphs are calls over the same buffers, and whatever lies in them that no step
has put there is poison.
"""

from __future__ import annotations

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.cards.graphs import Shapes
from dashinfer_vlm.engine.cards.runner import CardFlight, CardRunner
from dashinfer_vlm.engine.steps import Plan
from dashinfer_vlm.models.base import KVCache, Model


class PoisonedCardRunner(CardRunner):
    """Before each step, all that must be filled anew is full of nonsense: numbers as NaN, places outside everything."""

    num_pending = 0
    """Rows whose token only the device knew."""

    def start(self, plan: Plan) -> CardFlight:
        calls = self.calls
        poison_floats(calls.captured_logits)
        poison_floats(calls.items)
        calls.tables.fill_(1 << 20)
        for keys, values in zip(calls.all_kv.keys, calls.all_kv.values, strict=True):
            poison_floats(keys[-1])
            poison_floats(values[-1])
        calls.staging.static.fill_(0xFF)
        calls.staging._turns[calls.staging._turn ^ 1].fill_(0xFF)
        flight = super().start(plan)
        self.num_pending += sum(chunk.sequence.tokens[chunk.start] == -1 for chunk in plan.chunks)
        return flight


def poison_floats(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)


def make_card_runner(
    model: Model,
    kv: KVCache,
    embeddings: EmbeddingCache,
    config: EngineConfig,
    followers: None = None,
    *,
    depth: int = 1,
    with_graphs: bool = True,
) -> CardRunner:
    """In place of `devices.make_runner`, with few and small shapes."""
    max_rows = max(config.max_num_batched_tokens or 512, config.max_num_seqs)
    shapes = Shapes(config.max_num_seqs, max_rows, decode_sizes=(1, 2, 4), mixed_sizes=(4, 8, 12))
    runner = PoisonedCardRunner(model, with_spare_block(kv), embeddings, config, shapes, depth=depth)
    if with_graphs:
        runner.capture()
    return runner


def with_spare_block(kv: KVCache) -> KVCache:
    """So that what is left for sequences is what was given."""

    def longer(caches: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([cache, torch.zeros_like(cache[:1])]) for cache in caches]

    return KVCache(longer(kv.keys), longer(kv.values), kv.states)
