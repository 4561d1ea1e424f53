"""The encoder stage that hands its items to a crew of encoders elsewhere: child processes or other machines."""

from __future__ import annotations

import logging

import msgspec

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.elsewhere.crew import Crew, Encoded, Lost, Outcome, Refused
from dashinfer_vlm.encoders.in_step import InStepEncoder
from dashinfer_vlm.encoders.queue import ItemQueue
from dashinfer_vlm.encoders.stats import StageStats
from dashinfer_vlm.request import Item

log = logging.getLogger(__name__)

BATCH_DEADLINE_S = 0.004
"""How long an item may wait for others to share its batch."""
BATCHES_PER_ENCODER = 2
"""One at work and one that is there when it ends, since the engine looks only once a step."""
MAX_WAIT_S = 0.005
WAIT_SHARE = 0.01
"""Waiting for a result, as a share of the step's budget: nothing that a stream would feel."""
MIN_WAIT_S = 0.001


class WorkerEncoder:
    """Batches items across requests for `crew`; without an encoder there, `own` encodes them in the engine's step.

    An item over which an encoder has died goes to another encoder, and to the engine's own step only when no encoder
    is ready and none is expected soon: it may be what kills them.
    """

    def __init__(self, queue: ItemQueue, crew: Crew, own: InStepEncoder, max_batch_patches: int) -> None:
        self.queue = queue
        self.crew = crew
        self.own = own
        self.max_batch_patches = max_batch_patches
        self._num_handed_out = 0
        self._num_elsewhere = 0
        self._seconds = 0.0
        self._alone = False  # whether the log has said that the engine encodes itself

    @property
    def cache(self) -> EmbeddingCache:
        return self.queue.cache

    @property
    def stats(self) -> StageStats:
        return msgspec.structs.replace(
            self.queue.stats,
            num_items_encoded_elsewhere_total=self._num_elsewhere,
            num_encoder_restarts_total=self.crew.num_restarts,
            num_encoders=self.crew.num_ready,
            encoder_seconds_total=self._seconds + self.own.seconds,
        )

    def request(self, item: Item) -> None:
        self.queue.request(item)

    def release(self, item: Item) -> None:
        self.queue.release(item)

    def has_work(self) -> bool:
        return self._num_handed_out > 0 or self.own.has_work()

    @property
    def computes_here(self) -> bool:
        return self.own.is_busy or (self.queue.has_waiting() and not self.crew.num_ready)

    def advance(self, budget_s: float) -> None:
        """Collect, hand out, and only when neither gave anything to do wait a moment."""
        num_settled = self._collect(0.0)
        num_ready = self.crew.num_ready
        num_settled += self._hand_out(num_ready) if num_ready else self._take_back()
        if self.own.is_busy or (not num_ready and self._may_encode()):
            self.own.run(budget_s, lambda: self._own_items(num_ready))
        elif not num_settled and (wait_s := min(MAX_WAIT_S, WAIT_SHARE * budget_s)) >= MIN_WAIT_S:
            self._collect(wait_s)

    def take_failures(self) -> dict[bytes, str]:
        return self.queue.take_failures()

    def close(self) -> None:
        self.crew.close()

    def _collect(self, wait_s: float) -> int:
        outcomes = self.crew.outcomes(wait_s)
        for outcome in outcomes:
            self._settle(outcome)
        return len(outcomes)

    def _settle(self, outcome: Outcome) -> None:
        self._num_handed_out -= 1
        match outcome:
            case Encoded(items, embeddings, seconds):
                self._seconds += seconds
                device, before = self.own.device, self.queue.num_encoded
                self.queue.store(items, [embedding.to(device, non_blocking=True) for embedding in embeddings])
                self._num_elsewhere += self.queue.num_encoded - before
            case Refused(items, error):
                self.queue.fail(items, error)
            case Lost(items):
                self.queue.lost(items, blamed=True)

    def _hand_out(self, num_ready: int) -> int:
        """Number of batches that went to the crew."""
        self._alone = False
        num_batches = 0
        while (room := BATCHES_PER_ENCODER * num_ready - self._num_handed_out) > 0 and self.queue.has_waiting():
            num_patches = self.queue.num_waiting_patches
            if num_patches < self.max_batch_patches and self.queue.waited_s < BATCH_DEADLINE_S and not num_batches:
                break
            share = -(-num_patches // min(room, num_ready))  # no encoder idles while another has a full batch
            self.crew.submit(self.queue.take(min(self.max_batch_patches, share)))
            self._num_handed_out += 1
            num_batches += 1
        return num_batches

    def _take_back(self) -> int:
        """Batches that wait for encoders that are gone; number of them."""
        batches = self.crew.take_back()
        for items in batches:
            self._num_handed_out -= 1
            self.queue.lost(items, blamed=False)
        return len(batches)

    def _may_encode(self) -> bool:
        if not self.queue.has_waiting(suspects=not self.crew.num_starting):
            return False
        if not self._alone:
            log.warning("no encoder is ready (%d are starting); the engine encodes in its step", self.crew.num_starting)
            self._alone = True
        return True

    def _own_items(self, num_ready: int) -> list[Item]:
        if num_ready:
            return []
        return self.queue.take(self.own.max_batch_patches, suspects=not self.crew.num_starting)
