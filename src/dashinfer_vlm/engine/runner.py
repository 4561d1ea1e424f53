"""Turns a plan into one model call: packs chunks without padding, points at their blocks, writes item rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import numpy as np
import torch

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.grammars.masks import Masks
from dashinfer_vlm.engine.guesses import Guesser
from dashinfer_vlm.engine.sampler import Sampled, Sampler
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.steps import Chunk, Plan, vectors_of
from dashinfer_vlm.models.base import EmbeddingRows, GuessingModel, KVCache, Model, StepBatch
from dashinfer_vlm.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A flight that has landed when it is handed out."""

    plan: Plan
    _sampled: list[list[Sampled]]
    _scores: list[list[TokenLogprob]]
    _vectors: list[bytes]
    _seconds: float
    _sampling_s: float

    def resume(self) -> None:
        pass

    def sampled(self) -> list[list[Sampled]]:
        return self._sampled

    def scores(self) -> list[list[TokenLogprob]]:
        return self._scores

    def vectors(self) -> list[bytes]:
        return self._vectors

    def seconds(self) -> float:
        return self._seconds

    def sampling_seconds(self) -> float:
        return self._sampling_s


class Runner:
    """A StepRunner that computes its steps while it is asked to start them."""

    depth = 0

    def __init__(self, model: Model, kv: KVCache, embeddings: EmbeddingCache, *, num_guesses: int = 0) -> None:
        """`num_guesses` tokens are guessed by the model, which has a head for that."""
        self.model = model
        self.guesser = Guesser(cast(GuessingModel, model), kv, num_guesses) if num_guesses else None
        self.kv = kv
        self.embeddings = embeddings
        self.sampler = Sampler(model.eos_token_ids, model.device)
        self.masks = Masks(model.text.vocab_size, model.eos_token_ids)

    @torch.inference_mode()
    def start(self, plan: Plan) -> DoneStep:
        begun = time.perf_counter()
        for source, target in plan.copies:
            self.kv.copy_state(source, target)
        wanted = [(chunk.sequence, chunk.draft) for chunk in plan.sampled_chunks]
        mask = self.masks.begin(wanted)
        batch = self.batch(plan.chunks)
        logits, vectors, states = self._call(plan, batch)
        computed = time.perf_counter()
        num_sampled = len(logits) - plan.num_scored
        sampled = self.sampler.sample(logits[:num_sampled], wanted, mask()) if wanted else []
        scored = [(chunk.sequence, chunk.scored) for chunk in plan.scored_chunks]
        scores = self.sampler.scores(logits[num_sampled:], scored) if scored else []
        if self.guesser is not None and states is not None:
            sampled = self.guesser.guess(plan, batch, states, sampled)
        done = time.perf_counter()
        return DoneStep(plan, sampled, scores, vectors, done - begun, done - computed)

    def _call(self, plan: Plan, batch: StepBatch) -> tuple[torch.Tensor, list[bytes], torch.Tensor | None]:
        """The logits of the plan's rows, its vectors, and the states of all rows where there are guesses to make."""
        if self.guesser is not None:
            logits, vectors, states = self.guesser.model.forward_with_states(batch, self.kv, plan.num_logits)
            return logits, vectors_of(vectors.cpu()), states
        if not plan.vector_chunks:
            return self.model.forward(batch, self.kv), [], None
        logits, vectors = self.model.forward_with_vectors(batch, self.kv, plan.num_logits)
        return logits, vectors_of(vectors.cpu()), None

    def needs_tokens(self, sequence: Sequence) -> bool:
        return sequence.shaping.follows_output or sequence.matcher is not None

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept from step to step."""

    def batch(self, chunks: tuple[Chunk, ...]) -> StepBatch:
        """The chunks as one model call. Its logits: those of the `num_logits` of all chunks, then those of all `scored`
        tokens. Behind them the rows that give vectors."""
        starts = [0, *accumulate(chunk.num_rows for chunk in chunks)]
        ids, slots = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
        positions = np.empty((3, starts[-1]), np.int64)
        embeddings: list[EmbeddingRows] = []
        for (row, end), chunk in zip(pairwise(starts), chunks, strict=True):
            rows = slice(row, end)
            write_rows(chunk, self.kv.block_size, ids[rows], slots[rows], positions[:, rows])
            embeddings += item_rows(chunk, row, ids, self.embeddings, self.model.device)
        return StepBatch(
            ids=self._tensor(ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_starts=self._tensor(np.array(starts, np.int32)),
            context_lens=self._tensor(np.array([c.start + c.num_rows for c in chunks], np.int32)),
            block_tables=self._tensor(_block_tables(chunks)),
            logits_rows=self._tensor(rows_of_logits(chunks, starts)),
            embeddings=embeddings,
            seats=self._tensor(np.array([c.sequence.seat for c in chunks], np.int64)) if self.kv.states else None,
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.model.device, non_blocking=True)


def rows_of_logits(chunks: tuple[Chunk, ...], starts: list[int]) -> np.ndarray:
    """int64 [L]: the rows of a step that sampling wants, then those that tell of prompts, then those that give vectors;
    `starts` are the chunks' first rows, and the end."""
    sampled = [row for chunk, end in zip(chunks, starts[1:], strict=True) for row in range(end - chunk.num_logits, end)]
    scored = [
        start + token - 1 - chunk.start for chunk, start in zip(chunks, starts, strict=False) for token in chunk.scored
    ]
    pooled = [end - 1 for chunk, end in zip(chunks, starts[1:], strict=True) if chunk.gives_vector]
    return np.array(sampled + scored + pooled, np.int64)


def item_rows(
    chunk: Chunk, row: int, ids: np.ndarray, embeddings: EmbeddingCache, device: torch.device
) -> Iterator[EmbeddingRows]:
    """What overwrites word embeddings in the chunk that begins at `row`; the `ids` in those rows become 0."""
    start, stop = chunk.start, chunk.start + chunk.num_rows
    for item in chunk.sequence.pending_items:
        first, last = max(start, item.start), min(stop, item.start + item.num_tokens)
        if first < last:
            at = row + first - start
            ids[at : at + last - first] = 0
            offset = item.first_row - item.start
            found = item.embedding if item.embedding is not None else embeddings.get(item.content_hash)
            assert isinstance(found, torch.Tensor), f"the item at {item.start} was scheduled before it was encoded"
            yield EmbeddingRows(start=at, rows=found[first + offset : last + offset].to(device, non_blocking=True))


def write_rows(chunk: Chunk, block_size: int, ids: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
    """Fill int64 `ids` [n], `slots` [n] and `positions` [3, n] of a chunk of n rows."""
    sequence, start, num_rows = chunk.sequence, chunk.start, chunk.num_rows
    if num_rows == 1:  # decode, the step that everybody waits for: no arrays for single numbers
        ids[0] = sequence.tokens[start]
        slots[0] = sequence.blocks[start // block_size] * block_size + start % block_size
    else:
        indices = np.arange(start, start + num_rows)
        first = start // block_size
        blocks = np.array(sequence.blocks[first : indices[-1] // block_size + 1])
        ids[: chunk.num_tokens] = sequence.tokens[start : start + chunk.num_tokens]
        ids[chunk.num_tokens :] = chunk.draft
        slots[:] = blocks[indices // block_size - first] * block_size + indices % block_size
    if start >= sequence.num_prompt:
        positions[:] = start + sequence.position_offset if num_rows == 1 else indices + sequence.position_offset
    else:
        positions[:] = sequence.positions_of(start, start + num_rows).numpy()


def _block_tables(chunks: tuple[Chunk, ...]) -> np.ndarray:
    """int32 [S, most blocks], filled up with 0."""
    tables = [chunk.sequence.blocks for chunk in chunks]
    most = max(map(len, tables))
    return np.array([blocks + [0] * (most - len(blocks)) for blocks in tables], np.int32)
