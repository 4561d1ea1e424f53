"""Has a model's own head guess what follows the newest tokens (`--speculative-config` with the method mtp)."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import torch

from dashinfer_vlm.engine.sampler import Sampled
from dashinfer_vlm.engine.steps import Chunk, Plan
from dashinfer_vlm.models.base import EmbeddingRows, GuessingModel, KVCache, StepBatch


class Guesser:
    def __init__(self, model: GuessingModel, kv: KVCache, num_tokens: int) -> None:
        """`num_tokens` are guessed behind a sequence's newest token, at the most."""
        self.model = model
        self.kv = kv
        self.num_tokens = num_tokens

    def guess(
        self, plan: Plan, batch: StepBatch, states: torch.Tensor, sampled: list[list[Sampled]]
    ) -> list[list[Sampled]]:
        """`sampled`, in which the newest token of each sequence has guesses of those behind it. `states` are those of
        all rows of the step.

        The head sees each row's state and the token that follows it; so it keeps keys and values of all rows, of
        prompts, too. What does not follow for certain, such as a picture that the next chunk begins with, or what a
        request for a vector ends with, is word 0 to it: a guess may be worse for that, and costs time where it is
        wrong."""
        places = [
            _num_right(rows, chunk.draft) for chunk, rows in zip(plan.sampled_chunks, sampled, strict=True)
        ]  # of the newest tokens among those that were sampled
        following, newest = _following(plan, batch, sampled, places)
        following[(following < 0) | (following >= self.model.text.vocab_size)] = 0
        starts = set(batch.query_starts.tolist())
        guesses, states = self._call(
            replace(
                batch,
                ids=torch.from_numpy(following),
                embeddings=[_one_before(rows, rows.start in starts) for rows in batch.embeddings],
                logits_rows=torch.tensor(newest, dtype=torch.int64),
            ),
            states,
        )
        found = [[guess] for guess in guesses]
        self._guess_on(plan.sampled_chunks, places, states, found)
        return [
            [msgspec.structs.replace(row, guess=tuple(guess)) if i == place else row for i, row in enumerate(rows)]
            for rows, place, guess in zip(sampled, places, found, strict=True)
        ]

    def _guess_on(self, chunks: list[Chunk], places: list[int], states: torch.Tensor, found: list[list[int]]) -> None:
        """What follows each first guess in `found`, to which it is added. From here on the head's own results take the
        place of states that nobody has computed; the next step writes over their keys and values. A sequence whose
        next block is not there yet has no more guesses."""
        size, going = self.kv.block_size, list(range(len(chunks)))
        for count in range(1, self.num_tokens):
            indices = [chunks[i].start + chunks[i].num_tokens + places[i] + count - 1 for i in going]
            has_room = [index // size < len(chunks[i].sequence.blocks) for i, index in zip(going, indices, strict=True)]
            states = states[torch.tensor(has_room, dtype=torch.bool)]
            rows = [(i, index) for i, index, fits in zip(going, indices, has_room, strict=True) if fits]
            if not rows:
                return
            going = [i for i, _ in rows]
            guesses, states = self._call(
                self._next_rows([(chunks[i], index) for i, index in rows], found, going), states
            )
            for i, guess in zip(going, guesses, strict=True):
                found[i].append(guess)

    def _next_rows(self, rows: list[tuple[Chunk, int]], found: list[list[int]], going: list[int]) -> StepBatch:
        """A row for each sequence, at an index behind what was computed of it."""
        size, count = self.kv.block_size, len(rows)
        blocks = [chunk.sequence.blocks for chunk, _ in rows]
        most = max(map(len, blocks))
        positions = [index + chunk.sequence.position_offset for chunk, index in rows]
        slots = [own[index // size] * size + index % size for own, (_, index) in zip(blocks, rows, strict=True)]
        return StepBatch(
            ids=torch.tensor([found[i][-1] for i in going]),
            positions=torch.tensor(positions).repeat(3, 1),
            slots=torch.tensor(slots),
            query_starts=torch.arange(count + 1, dtype=torch.int32),
            context_lens=torch.tensor([index + 1 for _, index in rows], dtype=torch.int32),
            block_tables=torch.tensor([own + [0] * (most - len(own)) for own in blocks], dtype=torch.int32),
            logits_rows=torch.arange(count),
        )

    def _call(self, batch: StepBatch, states: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        logits, states = self.model.guess(batch, states, self.kv)
        guesses: list[int] = logits.argmax(dim=1).tolist()
        return guesses, states


def _following(
    plan: Plan, batch: StepBatch, sampled: list[list[Sampled]], places: list[int]
) -> tuple[np.ndarray, list[int]]:
    """int64 [T], the token behind each row's, or 0; and the rows in front of the newest tokens."""
    starts = batch.query_starts.tolist()
    following = np.zeros(starts[-1], np.int64)
    newest = []
    found = zip(sampled, places, strict=True)
    for chunk, start in zip(plan.chunks, starts, strict=False):
        known = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
        following[start : start + len(known)] = known
        if chunk.num_logits:
            (rows, place), first = next(found), start + chunk.num_tokens - 1
            newest.append(first + place)
            following[first : newest[-1] + 1] = [row.token for row in rows[: place + 1]]
    return following, newest


def _num_right(rows: list[Sampled], draft: tuple[int, ...]) -> int:
    """Guesses that came true, one after the other."""
    wrong = (i for i, (row, guess) in enumerate(zip(rows, draft, strict=False)) if row.token != guess)
    return next(wrong, len(draft))


def _one_before(rows: EmbeddingRows, is_first: bool) -> EmbeddingRows:
    """They follow the rows before them; the first one of a chunk follows a row of another step."""
    if is_first:
        return EmbeddingRows(start=rows.start, rows=rows.rows[1:])
    return EmbeddingRows(start=rows.start - 1, rows=rows.rows)
