"""The encoder stage that shares the engine's device and thread: slices as large as the step has time for.

A stage that runs elsewhere (`elsewhere/stage.py`) does its work between the calls, and `advance` only hands out and
collects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import msgspec
import numpy as np
import torch

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.clock import SliceClock, slice_clock
from dashinfer_vlm.encoders.copies import PatchCopies
from dashinfer_vlm.encoders.queue import ItemQueue, grid, raw_patches
from dashinfer_vlm.encoders.stats import StageStats
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.models.base import EncoderState, VisionEncoder
from dashinfer_vlm.request import Item

MAX_WAITS = 16
"""Steps with time for the encoder that may pass without a slice, however long one seems to take. Slices are small: what
takes that much longer was learnt from one that was unusual, and the next one says better."""


@dataclass(slots=True)
class _Batch:
    items: list[Item]
    state: EncoderState


@dataclass(slots=True)
class InStepEncoder:
    """Runs the ViT between the model calls of the LLM, a few slices at a time.

    A card has slices under way when `advance` returns, and an embedding is in the cache as soon as its last slice was
    started: whoever reads it does so later on the same stream.
    """

    encoder: VisionEncoder
    queue: ItemQueue
    device: torch.device
    max_batch_patches: int
    seconds: float = 0.0
    _batch: _Batch | None = None
    _saved_s: float = 0.0  # what earlier calls were given and did not use, up to one slice; below 0 they took more
    _num_waits: int = 0  # calls with a budget since the last slice
    _clock: SliceClock = field(init=False)
    _copies: PatchCopies | None = field(init=False)

    def __post_init__(self) -> None:
        self._clock = slice_clock(self.device)
        self._copies = PatchCopies() if self.device.type == "cuda" else None

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
        is_first = self.queue.request(item)
        if is_first and self._copies is not None:
            self._copies.begin(item)

    def release(self, item: Item) -> None:
        is_last = self.queue.release(item)
        if is_last and self._copies is not None:
            self._copies.give_up(item)

    def has_work(self) -> bool:
        return self.is_busy or self.queue.has_waiting()

    @property
    def computes_here(self) -> bool:
        return self.has_work()

    def advance(self, budget_s: float) -> None:
        self.run(budget_s, lambda: self.queue.take(self.max_batch_patches))

    def run(self, budget_s: float, next_items: Callable[[], list[Item]]) -> None:
        """`advance` with batches from `next_items`, which may have none left."""
        spent, slice_s = 0.0, self._clock.slice_s
        self._saved_s = min(max(self._saved_s, -slice_s), slice_s) + budget_s
        self._num_waits += budget_s > 0
        room_s = budget_s if budget_s >= slice_s else self._saved_s
        if self._num_waits > MAX_WAITS:
            room_s = inf
        while spent + self._clock.slice_s <= room_s and (items := self._batch.items if self._batch else next_items()):
            spent += self._timed_slice(items)
            room_s, self._num_waits = budget_s, 0
        self._saved_s -= spent
        self.seconds += spent

    def take_failures(self) -> dict[bytes, str]:
        return self.queue.take_failures()

    def close(self) -> None:
        if self._copies is not None:
            self._copies.close()

    def _timed_slice(self, items: list[Item]) -> float:
        """Seconds of the next slice of these items."""
        self._clock.start()
        try:
            self._advance_one_slice(items)
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001 - one item's failure must not end the engine's step
            self._batch = None
            self.queue.fail(items, error)
        return self._clock.stop()

    def _advance_one_slice(self, items: list[Item]) -> None:
        if self._batch is None:
            self._batch = _Batch(items, self.encoder.begin([self._patches(i) for i in items], [grid(i) for i in items]))
        self.encoder.run(self._batch.state, 1)
        if self._batch.state.done:
            embeddings = self.encoder.finish(self._batch.state)
            self._batch = None
            self.queue.store(items, embeddings)

    def _patches(self, item: Item) -> torch.Tensor:
        if self._copies is not None:  # what is not pinned would be sent when the card has done all that it has to do
            return self._copies.take(item).to(self.device, non_blocking=True)
        patches = raw_patches(item)
        # a private copy of an array: the shared file may be unmapped any time
        return torch.from_numpy(np.array(patches)) if isinstance(patches, np.ndarray) else patches
