"""A model with no weights whose next token depends on every value in its context, read through the block tables.

Not a mock of the engine: blocks, slots, positions and embeddings are used as a real model uses them, so that a wrong
block, a stale slot or a misplaced embedding row changes the answer. `expected` computes the answer without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dashinfer_vlm.layers.ranks import ALONE
from dashinfer_vlm.models.base import KVCache, StepBatch, TextShape
from dashinfer_vlm.request import Grid, Item

VOCAB = 101
EOS = 100


@dataclass
class ScriptedState:
    patches: list[torch.Tensor]
    num_left: int = 3

    @property
    def done(self) -> bool:
        return self.num_left == 0


class ScriptedEncoder:
    """Embedding row i is the sum of patches 4i .. 4i + 3, as [tokens, 1]."""

    bytes_per_patch = 8

    def __init__(self) -> None:
        self.num_begun = 0
        self.poison: int | None = None

    def begin(self, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> ScriptedState:
        self.num_begun += len(patches)
        if any(self.poison is not None and int(p[0, 0]) == self.poison for p in patches):
            raise RuntimeError("poison")
        return ScriptedState(list(patches))

    def run(self, state: ScriptedState, num_slices: int) -> None:
        state.num_left = max(0, state.num_left - num_slices)

    def finish(self, state: ScriptedState) -> list[torch.Tensor]:
        return [p.double().reshape(-1, 4, p.shape[1]).sum(dim=(1, 2)).unsqueeze(1) for p in state.patches]


class ScriptedModel:
    text = TextShape(
        vocab_size=VOCAB, hidden_size=1, num_kv_layers=1, num_kv_heads=1, head_dim=1, max_position_embeddings=512
    )
    embedding_size = 1
    eos_token_ids: tuple[int, ...] = (EOS,)
    device = torch.device("cpu")
    kv_dtype = torch.float64
    activation_dtype = torch.float64
    ranks = ALONE

    def __init__(self) -> None:
        self.encoder = ScriptedEncoder()
        self.num_calls = 0
        self.tokens_per_call: list[int] = []

    def kv(self, num_blocks: int = 64, block_size: int = 4) -> KVCache:
        shape = (num_blocks, block_size, 1, 1)
        return KVCache([torch.full(shape, -1e6, dtype=torch.float64)], [torch.zeros(shape, dtype=torch.float64)])

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        self.num_calls += 1
        self.tokens_per_call.append(len(batch.ids))
        assert int(batch.ids.max()) < VOCAB
        values = batch.ids.double()
        for rows in batch.embeddings:
            values[rows.start : rows.start + len(rows.rows)] = rows.rows.double()[:, 0]
        if batch.staged is not None:
            values = torch.where(batch.staged.is_item, batch.staged.rows[:, 0], values)
        kv.keys[0].view(-1)[batch.slots] = values * (batch.positions[0] + 1)
        answers: dict[int, torch.Tensor] = {}
        stops = batch.query_starts[1:].tolist()
        wanted = batch.logits_rows.tolist()
        for s, length in enumerate(batch.context_lens.tolist()):
            blocks = batch.block_tables[s, : -(-length // kv.block_size)].long()
            context = kv.keys[0][blocks].reshape(-1)[:length]
            for row in set(wanted) & set(range(stops[s] - length, stops[s])):
                if row >= batch.query_starts[s]:
                    answers[row] = one_hot(self.answer(context[: length - (stops[s] - 1 - row)]))
        nobodys = torch.full((VOCAB,), torch.nan)
        return torch.stack([answers.get(row, nobodys) for row in wanted]) if wanted else torch.empty(0, VOCAB)

    def forward_with_vectors(self, batch: StepBatch, kv: KVCache, num_logits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A vector is the token that would come next."""
        logits = self.forward(batch, kv)
        return logits[:num_logits], logits[num_logits:].argmax(dim=1, keepdim=True).float()

    def answer(self, context: torch.Tensor) -> int:
        return answer(context)

    def positions(self, num_tokens: int, items: Sequence[Item]) -> tuple[torch.Tensor, int]:
        return torch.arange(num_tokens).expand(3, -1), 0


def answer(context: torch.Tensor) -> int:
    """Never the end-of-sequence token, so that lengths are what the test asks for."""
    return int(context.sum().item()) % EOS


def one_hot(token: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), VOCAB).float() * 10


def expected(values: Sequence[float], num_tokens: int) -> list[int]:
    """The greedy continuation of a context of ids and embedding values."""
    context = list(values)
    out = []
    for _ in range(num_tokens):
        out.append(answer(torch.tensor([v * (i + 1) for i, v in enumerate(context)], dtype=torch.float64)))
        context.append(out[-1])
    return out
