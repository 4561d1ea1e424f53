"""A StepRunner for cards: the next step is planned and started while this one computes."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.engine.cards.calls import Call, Followers, ModelCalls
from dashinfer_vlm.engine.cards.graphs import Shapes
from dashinfer_vlm.engine.cards.packing import pack_rows, pack_sampling
from dashinfer_vlm.engine.cards.sampling import CardSampler, Chosen, Scored, Wanted, counts_on_device, waits_for_tokens
from dashinfer_vlm.engine.cards.seats import Seat, Seats
from dashinfer_vlm.engine.cards.staging import Arrays, Shape
from dashinfer_vlm.engine.grammars.masks import Masks
from dashinfer_vlm.engine.runner import item_rows
from dashinfer_vlm.engine.sampler import Sampled, Sampler
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.steps import Chunk, Plan, vectors_of
from dashinfer_vlm.layers.card_sampling import candidates
from dashinfer_vlm.layers.marks import Mark, mark
from dashinfer_vlm.models.base import KVCache, Model
from dashinfer_vlm.request import TokenLogprob


class CardFlight:
    """A step under way, whose choice of tokens may still have to be started."""

    def __init__(
        self,
        plan: Plan,
        begin: Mark,
        sampler: CardSampler,
        wanted: Wanted | None,
        scored: Scored | None,
        vectors: Tensor | None,
    ) -> None:
        """`vectors` are on their way to the host."""
        self.plan = plan
        self._scored = scored
        self._vectors = vectors
        self._begin = begin
        self._sampler = sampler
        self._wanted = wanted
        self._chosen: Chosen | None = None
        self._end: Mark | None = None
        if wanted is None or not any(waits_for_tokens(chunk) for chunk in wanted.chunks):
            self.resume()

    def resume(self) -> None:
        if self._end is not None:
            return
        if self._wanted is not None:
            with torch.inference_mode():
                self._chosen = self._sampler.choose(self._wanted)
        self._end = mark(self._sampler.newest.device)

    def sampled(self) -> list[list[Sampled]]:
        self.resume()
        assert self._end is not None
        self._end.wait()
        return [] if self._chosen is None else self._chosen.sampled(self.plan.sampled_chunks)

    def scores(self) -> list[list[TokenLogprob]]:
        return [] if self._scored is None else self._scored.scores()

    def vectors(self) -> list[bytes]:
        return [] if self._vectors is None else vectors_of(self._vectors)

    def seconds(self) -> float:
        assert self._end is not None
        return self._begin.seconds_to(self._end)

    def sampling_seconds(self) -> float:
        return 0.0


class CardRunner:
    """See `engine.steps.StepRunner`. The last block of the cache that it is given is its own: padding writes there."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        embeddings: EmbeddingCache,
        config: EngineConfig,
        shapes: Shapes,
        *,
        depth: int = 1,
        followers: Followers | None = None,
    ) -> None:
        """`followers` are the other ranks of a model that is shared: they run the same model calls."""
        self.model = model
        self.depth = depth
        self.shapes = shapes
        self.calls = ModelCalls(model, kv, config, shapes)
        self.kv = self.calls.kv
        self._followers = followers
        self._embeddings = embeddings
        self._seats = Seats(self.calls.num_seats, self.calls.max_blocks)
        sampler = Sampler(model.eos_token_ids, model.device)
        masks = Masks(model.text.vocab_size, model.eos_token_ids)
        self._sampler = CardSampler(sampler, masks, model.device, self.calls.newest, model.text.vocab_size)

    def capture(self) -> None:
        """Make a graph of every shape; steps of others are started kernel by kernel."""
        self.calls.capture()

    @torch.inference_mode()
    def start(self, plan: Plan) -> CardFlight:
        begin = mark(self.model.device)
        self.calls.copy_states(plan.copies)
        block_size = self.kv.block_size
        seated = [self._take_seat(chunk, block_size) for chunk in plan.chunks]
        has_items = any(chunk.sequence.pending_items for chunk in plan.chunks)
        num_vectors = len(plan.vector_chunks)
        num_rows = plan.num_logits + num_vectors
        shape = self.shapes.of(plan.num_tokens, len(plan.chunks), num_rows, has_items=has_items)
        flat = self.calls.staging.next()
        arrays = self.calls.staging.arrays(shape)
        pack_rows(plan.chunks, seated, self._seats, self.calls.spare, arrays)
        items = self._find_items(plan, arrays) if has_items else []
        counted = self._pack_sampling(plan, seated, arrays)
        first_vector = plan.num_logits if num_vectors else None
        call = self._pack_tables(
            shape, seated, flat, has_items=bool(items), copies=plan.copies, first_vector=first_vector
        )
        if self._followers is not None:
            self._followers.call(call, flat[: call.num_bytes])
        self.calls.send(call)
        self.calls.put_items(call, items)
        logits, vectors = self.calls.make(call)
        groups = [(chunk.sequence, chunk.scored) for chunk in plan.scored_chunks]
        num_logits = plan.num_logits - plan.num_scored
        scored = self._sampler.score(logits[num_logits : plan.num_logits], groups) if groups else None
        wanted = Wanted(
            plan.sampled_chunks,
            num_logits,
            counted,
            self.calls.asked(shape, num_logits),
            logits,
            _num_candidates(arrays, num_logits, self.model.text.vocab_size),
        )
        told = None if vectors is None else self._sampler.home(vectors[:num_vectors])
        flight = CardFlight(plan, begin, self._sampler, wanted if num_logits else None, scored, told)
        self._seats.started(plan.chunks, seated)
        return flight

    def needs_tokens(self, sequence: Sequence) -> bool:
        """Never: what the host must apply is applied when the tokens are there, while the model computes."""
        return False

    def forget(self, sequence: Sequence) -> None:
        self._seats.leave(sequence)

    def _take_seat(self, chunk: Chunk, block_size: int) -> Seat:
        seat = self._seats.take(chunk, block_size)
        if not seat.is_counted:
            self._sampler.take_seat(seat)
            seat.is_counted = True
        return seat

    def _find_items(self, plan: Plan, arrays: Arrays) -> list[tuple[int, Tensor]]:
        """Rows of embeddings, and where they begin in the step, which is told that they are items'."""
        found = []
        starts = accumulate((chunk.num_rows for chunk in plan.chunks), initial=0)
        for row, chunk in zip(starts, plan.chunks, strict=False):
            for item in item_rows(chunk, row, arrays["ids"], self._embeddings, self.model.device):
                arrays["is_item"][item.start : item.start + len(item.rows)] = True
                found.append((item.start, item.rows))
        return found

    def _pack_sampling(self, plan: Plan, seated: list[Seat], arrays: Arrays) -> int:
        """How many rows' seen tokens the device counts."""
        wanted = [(chunk, seat) for chunk, seat in zip(plan.chunks, seated, strict=True) if chunk.num_logits]
        chunks, seats = [chunk for chunk, _ in wanted], [seat for _, seat in wanted]
        pack_sampling(chunks, seats, self._seats, arrays)
        rows = accumulate([chunk.num_logits for chunk in chunks], initial=0)
        counted = [
            (row, seat.index)
            for row, (chunk, seat) in zip(rows, wanted, strict=False)
            if counts_on_device(chunk.sequence)
        ]
        if counted:
            arrays["counted_rows"][: len(counted)], arrays["counted_seats"][: len(counted)] = zip(*counted, strict=True)
        return len(counted)

    def _pack_tables(
        self,
        shape: Shape,
        seated: list[Seat],
        flat: np.ndarray,
        *,
        has_items: bool,
        copies: tuple[tuple[int, int], ...],
        first_vector: int | None,
    ) -> Call:
        """Block tables travel as wide as they are."""
        width = max((len(seat.blocks) for seat in seated), default=0)
        call = Call(shape, len(seated), width, has_items, copies, first_vector)
        tables = call.tables(flat)
        tables[:] = self._seats.tables[[seat.index for seat in seated], :width]
        return call


def _num_candidates(arrays: Arrays, num_rows: int, vocab_size: int) -> int | None:
    temperature, top_k, top_p = (arrays[name][:num_rows] for name in ("temperature", "top_k", "top_p"))
    return candidates(temperature, top_k, top_p, vocab_size)
