"""The encoder stage that shares the engine's device and thread: slices as large as the step has time for.

A stage that runs elsewhere (`elsewhere/stage.py`) does its work between the calls, and `advance` only hands out and
collects.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.queue import ItemQueue, grid, raw_patches
from dashinfer_vlm.encoders.stats import StageStats
from dashinfer_vlm.models.base import EncoderState, VisionEncoder
from dashinfer_vlm.request import Item

SLICE_RATE = 0.2
"""Weight of the latest slice in the estimate: a machine that slows down is noticed, one hiccup is forgotten soon."""


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
    def stats(self) -> StageStats:
        return msgspec.structs.replace(self.queue.stats, encoder_seconds_total=self.seconds)

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
