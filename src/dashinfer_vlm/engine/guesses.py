"""Has a model's own head guess what follows the newest tokens (`--speculative-config` with the method mtp)."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import torch

from dashinfer_vlm.engine.sampler import Sampled
from dashinfer_vlm.engine.steps import Plan
from dashinfer_vlm.models.base import EmbeddingRows, GuessingModel, KVCache, StepBatch


def with_guesses(
    model: GuessingModel,
    kv: KVCache,
    plan: Plan,
    batch: StepBatch,
    states: torch.Tensor,
    sampled: list[list[Sampled]],
) -> list[list[Sampled]]:
    """`sampled`, in which the newest token of each sequence has a guess of the one behind it.

    The head sees each row's state and the token that follows it; so it keeps keys and values of all rows, of prompts,
    too. What does not follow for certain, such as a picture that the next chunk begins with, or what a request for a
    vector ends with, is word 0 to it: a guess may be worse for that, and costs time where it is wrong."""
    starts = batch.query_starts.tolist()
    following = np.zeros(starts[-1], np.int64)
    newest: list[int] = []
    places: list[int] = []
    found = iter(sampled)
    for chunk, start in zip(plan.chunks, starts, strict=False):
        known = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
        following[start : start + len(known)] = known
        if chunk.num_logits:
            rows, first = next(found), start + chunk.num_tokens - 1
            places.append(_num_right(rows, chunk.draft))
            newest.append(first + places[-1])
            following[first : newest[-1] + 1] = [row.token for row in rows[: places[-1] + 1]]
    following[(following < 0) | (following >= model.text.vocab_size)] = 0
    device = batch.ids.device
    shifted = replace(
        batch,
        ids=torch.from_numpy(following).to(device),
        embeddings=[_one_before(rows, rows.start in starts) for rows in batch.embeddings],
        logits_rows=torch.tensor(newest, dtype=torch.int64, device=device),
    )
    guesses = model.guess(shifted, states, kv).argmax(dim=1).tolist()
    return [
        [msgspec.structs.replace(row, guess=guess) if i == place else row for i, row in enumerate(rows)]
        for rows, place, guess in zip(sampled, places, guesses, strict=True)
    ]


def _num_right(rows: list[Sampled], draft: tuple[int, ...]) -> int:
    """Guesses that came true, one after the other."""
    wrong = (i for i, (row, guess) in enumerate(zip(rows, draft, strict=False)) if row.token != guess)
    return next(wrong, len(draft))


def _one_before(rows: EmbeddingRows, is_first: bool) -> EmbeddingRows:
    """They follow the rows before them; the first one of a chunk follows a row of another step."""
    if is_first:
        return EmbeddingRows(start=rows.start, rows=rows.rows[1:])
    return EmbeddingRows(start=rows.start - 1, rows=rows.rows)
