"""The ViT as a stage of its own: items in, embeddings out, in slices as large as the step has time for.

The scheduler sees only the verbs of `EncoderStage`. Here the stage shares the engine's device and thread
(`InStepEncoder`); a stage that runs elsewhere (`workers.WorkerEncoder`) does its work between the calls, and `advance`
only hands out and collects.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dashinfer_vlm.engine.request import Item
from dashinfer_vlm.models.base import EncoderState, VisionEncoder
from dashinfer_vlm.vision.cache import EmbeddingCache
from dashinfer_vlm.vision.queue import ItemQueue, grid, raw_patches

SLICE_RATE = 0.2
"""Weight of the latest slice in the estimate: a machine that slows down is noticed, one hiccup is forgotten soon."""


class EncoderStage(Protocol):
    """What the engine needs of an encoder, wherever it runs."""

    @property
    def cache(self) -> EmbeddingCache: ...

    @property
    def counters(self) -> EncoderCounters: ...

    def request(self, item: Item) -> None:
        """Pin the item's embedding and see to it that it will be there; a second request for the same content shares
        the work. One `release` per `request`."""
        ...

    def release(self, item: Item) -> None: ...

    def has_work(self) -> bool: ...

    def advance(self, budget_s: float) -> None:
        """Work for about `budget_s` seconds; finished embeddings are in `cache` afterwards. What is too little for a
        slice is saved up for the next call, so that over many calls the budget is kept on average.

        A stage that runs elsewhere never waits while streams do: at most for a hundredth of a long budget."""
        ...

    @property
    def computes_here(self) -> bool:
        """Whether `advance` would now compute in the engine's own time."""
        ...

    def take_failures(self) -> dict[bytes, str]:
        """Content hashes that could not be encoded since the last call, with the reason."""
        ...

    def close(self) -> None:
        """Give back processes and machines; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderCounters:
    """What a stage has done since its start."""

    num_encoded: int
    num_patches: int
    num_failures: int
    """Items that were given up."""
    num_retries: int
    """Items that were tried again, after a failed batch or the death of an encoder."""
    num_restarts: int
    """Encoders elsewhere that were started in place of another one."""
    seconds: float
    """Time of all encoders together."""
    num_elsewhere: int = 0
    """Of `num_encoded`, those that other processes or machines have encoded."""
    num_ready: int = 0
    """Encoders elsewhere that are ready now."""


@dataclass(slots=True)
class _Batch:
    items: list[Item]
    state: EncoderState


@dataclass(slots=True)
class InStepEncoder:
    """Runs the ViT between the model calls of the LLM, a few slices at a time."""

    encoder: VisionEncoder
    queue: ItemQueue
    device: torch.device
    max_batch_patches: int
    seconds: float = 0.0
    _batch: _Batch | None = None
    _slice_s: float = 0.0  # what a slice takes, the latest weighing most
    _saved_s: float = 0.0  # what earlier calls were given and did not use, up to one slice; below 0 they took more

    @property
    def cache(self) -> EmbeddingCache:
        return self.queue.cache

    @property
    def counters(self) -> EncoderCounters:
        q = self.queue
        return EncoderCounters(q.num_encoded, q.num_patches, q.num_failures, q.num_retries, 0, self.seconds)

    @property
    def is_busy(self) -> bool:
        """Whether a batch is under way."""
        return self._batch is not None

    def request(self, item: Item) -> None:
        self.queue.request(item)

    def release(self, item: Item) -> None:
        self.queue.release(item)

    def has_work(self) -> bool:
        return self.is_busy or self.queue.has_waiting()

    @property
    def computes_here(self) -> bool:
        return self.has_work()

    def advance(self, budget_s: float) -> None:
        self.run(budget_s, lambda: self.queue.take(self.max_batch_patches))

    def run(self, budget_s: float, next_items: Callable[[], list[Item]]) -> None:
        """`advance` with batches from `next_items`, which may have none left."""
        start, spent = time.perf_counter(), 0.0
        self._saved_s = min(max(self._saved_s, -self._slice_s), self._slice_s) + budget_s
        room_s = budget_s if budget_s >= self._slice_s else self._saved_s
        while spent + self._slice_s <= room_s and self._advance_one_slice(next_items):
            spent = time.perf_counter() - start
            room_s = budget_s
        self._saved_s -= spent
        self.seconds += spent

    def take_failures(self) -> dict[bytes, str]:
        return self.queue.take_failures()

    def close(self) -> None:
        """Nothing is held elsewhere."""

    def _advance_one_slice(self, next_items: Callable[[], list[Item]]) -> bool:
        """False when there is nothing to do."""
        items = self._batch.items if self._batch else next_items()
        if not items:
            return False
        start = time.perf_counter()
        try:
            if self._batch is None:
                state = self.encoder.begin([self._patches(i) for i in items], [grid(i) for i in items])
                self._batch = _Batch(items, state)
            self.encoder.run(self._batch.state, 1)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken_s = time.perf_counter() - start
            self._slice_s += SLICE_RATE * (taken_s - self._slice_s) if self._slice_s else taken_s
            if self._batch.state.done:
                embeddings = self.encoder.finish(self._batch.state)
                self._batch = None
                self.queue.store(items, embeddings)
        except Exception as error:  # noqa: BLE001 - one item's failure must not end the engine's step
            self._batch = None
            self.queue.fail(items, error)
        return True

    def _patches(self, item: Item) -> torch.Tensor:
        patches = raw_patches(item)
        if isinstance(patches, np.ndarray):
            patches = torch.from_numpy(np.array(patches))  # a private copy: the shared file may be unmapped any time
        return patches.to(self.device, non_blocking=True)
