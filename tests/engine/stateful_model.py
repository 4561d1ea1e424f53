"""The scripted model with a state of each sequence beside keys and values, as hybrid models have: both must agree."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from dashinfer_vlm.models.base import KVCache, StepBatch
from dashinfer_vlm.models.config import DeltaNetConfig
from tests.engine.scripted_model import ScriptedModel

DELTA_NET = DeltaNetConfig(
    layers=frozenset({0}), num_key_heads=1, num_value_heads=1, key_dim=1, value_dim=1, conv_size=2
)


class StatefulModel(ScriptedModel):
    """A state is the sum of what the keys of its sequence hold."""

    text = replace(ScriptedModel.text, delta_net=DELTA_NET)

    def __init__(self, num_seats: int) -> None:
        super().__init__()
        self.num_seats = num_seats

    def kv(self, num_blocks: int = 64, block_size: int = 4) -> KVCache:
        """States are NaN where none is."""
        kv = super().kv(num_blocks, block_size)
        sums = torch.full((1, self.num_seats), torch.nan, dtype=torch.float64)
        return KVCache(kv.keys, kv.values, (sums.clone(), sums))

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        logits = super().forward(batch, kv)
        counts, sums = (state[0] for state in kv.states)
        assert batch.seats is not None
        seats, written = batch.seats.tolist(), kv.keys[0].view(-1)[batch.slots]
        seated = [seat for seat, context in zip(seats, batch.context_lens.tolist(), strict=True) if context]
        assert len(set(seated)) == len(seated), "two sequences in one seat"
        contexts, tables = batch.context_lens.tolist(), batch.block_tables.long()
        chunks = zip(seats, contexts, tables, pairwise(batch.query_starts.tolist()), strict=True)
        for seat, context, table, (start, stop) in chunks:
            if not context:
                continue  # padding
            if context == stop - start:
                counts[seat] = sums[seat] = 0
            totals = sums[seat] + written[start:stop].cumsum(0)
            counts[seat], sums[seat] = counts[seat] + stop - start, totals[-1]
            assert counts[seat] == context, "a state of another length"
            keys = kv.keys[0][table[: -(-context // kv.block_size)]].view(-1)[:context]
            assert torch.equal(totals, keys.cumsum(0)[start - stop :]), "a state of another sequence"
        return logits
