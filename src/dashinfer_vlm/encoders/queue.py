"""What is still to be encoded, wherever that happens: one queue by content, retries, and what became of each item."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.stats import StageStats
from dashinfer_vlm.request import Item
from dashinfer_vlm.stages import Span

log = logging.getLogger(__name__)

MAX_DEATHS = 2
"""So many encoders may die over one item: the first death may be another item's doing or nobody's, the next one, with
the item alone, is not."""
REFUSED = "the image could not be encoded"


class ItemQueue:
    """Items by content hash: waiting, in flight, or done and in `cache`. Belongs to the engine's thread.

    Who takes items must return them all, to exactly one of `store`, `fail` and `lost`. A batch that fails or kills its
    encoder is tried again item by item; what fails alone is given up.
    """

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache = cache
        self.num_encoded = 0
        self.num_patches = 0
        self.num_failures = 0
        self.num_retries = 0
        self._waiting: OrderedDict[bytes, Item] = OrderedDict()
        self._in_flight: set[bytes] = set()
        self._asked_s: dict[bytes, float] = {}  # when it began to wait, of what waits and of what is in flight
        self._taken_s: dict[bytes, float] = {}  # of what is in flight
        self._alone: set[bytes] = set()  # members of a batch that went wrong: tried one by one
        self._deaths: Counter[bytes] = Counter()
        self._failures: dict[bytes, str] = {}
        self._oldest_s = 0.0

    @property
    def stats(self) -> StageStats:
        """What became of items, and of the cache; whoever encodes adds how."""
        return StageStats(
            num_items_encoded_total=self.num_encoded,
            num_patches_encoded_total=self.num_patches,
            num_encoder_failures_total=self.num_failures,
            num_encoder_retries_total=self.num_retries,
            embedding_hits_total=self.cache.hits,
            embedding_misses_total=self.cache.misses,
            embedding_bytes=self.cache.num_bytes,
        )

    def request(self, item: Item) -> bool:
        """See `stage.EncoderStage.request`. Whether the item waits from now on."""
        key = item.content_hash
        self.cache.pin(key)
        if key in self.cache:
            self.cache.get(key)
        elif key not in self._waiting and key not in self._in_flight:
            self.cache.misses += 1
            self._wait(item)
            return True
        self.cache.hits += 1
        return False

    def release(self, item: Item) -> bool:
        """See `stage.EncoderStage.release`. Whether the item has been waiting and does so no more; what is in flight is
        finished and cached all the same."""
        key = item.content_hash
        self.cache.unpin(key)
        if self.cache.is_pinned(key) or key not in self._waiting:
            return False
        del self._waiting[key]
        self._forget(key)
        return True

    def take_failures(self) -> dict[bytes, str]:
        """Content hashes that were given up since the last call, with the reason."""
        failures, self._failures = self._failures, {}
        return failures

    def has_waiting(self, *, suspects: bool = True) -> bool:
        """Whether `take` would find something; `suspects` are items over which an encoder has died."""
        return bool(self._waiting) and (suspects or any(key not in self._deaths for key in self._waiting))

    @property
    def num_waiting_patches(self) -> int:
        return sum(item.work for item in self._waiting.values())

    @property
    def waited_s(self) -> float:
        """How long something has been waiting."""
        return time.perf_counter() - self._oldest_s if self._waiting else 0.0

    def take(self, max_patches: int, *, suspects: bool = True) -> list[Item]:
        """The next batch, first come, first served, up to `max_patches` (one item may exceed it alone)."""
        items: list[Item] = []
        room = max_patches
        for key, item in self._waiting.items():
            if key in self._deaths and not suspects:
                continue
            room -= item.work
            if items and (room < 0 or key in self._alone):
                break
            items.append(item)
            if key in self._alone:
                break
        for item in items:
            del self._waiting[item.content_hash]
            self._in_flight.add(item.content_hash)
            self._taken_s[item.content_hash] = time.perf_counter()
        self._oldest_s = time.perf_counter()
        return items

    def store(self, items: Sequence[Item], embeddings: Sequence[torch.Tensor]) -> None:
        """Cache `[tokens, hidden]` for each item; one with a wrong number of rows fails."""
        for item, embedding in zip(items, embeddings, strict=True):
            if len(embedding) != item.num_rows:
                self.fail([item], ValueError(f"{len(embedding)} embedding rows for {item.num_rows} placeholders"))
                continue
            self.cache.put(item.content_hash, embedding, self._spans(item.content_hash))
            self._forget(item.content_hash)
            self.num_encoded += 1
            self.num_patches += item.work

    def fail(self, items: Sequence[Item], error: Exception) -> None:
        """The encoder is well, but refused these items."""
        if len(items) == 1:
            log.error("encoding an item with grid %s failed", items[0].grid, exc_info=error)
            self._give_up(items[0])
            return
        log.warning("encoding %d items together failed (%s); trying them one by one", len(items), error)
        for item in items:
            self._retry(item, alone=True)

    def lost(self, items: Sequence[Item], *, blamed: bool) -> None:
        """Their encoder is gone; `blamed` when it was working on them."""
        for item in items:
            self._deaths[item.content_hash] += blamed
            if self._deaths[item.content_hash] >= MAX_DEATHS:
                log.error("an item with grid %s killed its encoder twice and is given up", item.grid)
                self._give_up(item)
            else:
                self._retry(item, alone=blamed)
        self._deaths = +self._deaths

    def _wait(self, item: Item) -> None:
        now_s = time.perf_counter()
        if not self._waiting:
            self._oldest_s = now_s
        self._waiting[item.content_hash] = item
        self._asked_s.setdefault(item.content_hash, now_s)

    def _spans(self, key: bytes) -> tuple[Span, Span]:
        asked_s, taken_s = self._asked_s[key], self._taken_s[key]
        return Span("encode_wait", asked_s, taken_s), Span("encode", taken_s, time.perf_counter())

    def _retry(self, item: Item, *, alone: bool) -> None:
        key = item.content_hash
        self._in_flight.discard(key)
        if not self.cache.is_pinned(key):
            self._forget(key)
            return
        if alone:
            self.num_retries += 1
            self._alone.add(key)
        self._wait(item)

    def _give_up(self, item: Item) -> None:
        self._forget(item.content_hash)
        self._failures[item.content_hash] = REFUSED
        self.num_failures += 1

    def _forget(self, key: bytes) -> None:
        self._in_flight.discard(key)
        self._alone.discard(key)
        self._asked_s.pop(key, None)
        self._taken_s.pop(key, None)
        self._deaths.pop(key, None)


def raw_patches(item: Item) -> np.ndarray | torch.Tensor:
    """The item's patches, which the engine's loop has mapped."""
    patches = item.patches
    assert isinstance(patches, np.ndarray | torch.Tensor), "an item without mapped patches reached the encoder"
    return patches


def grid(item: Item) -> tuple[int, int, int]:
    """The item's grid; only ready-made embeddings have none."""
    assert item.grid is not None, "an item without a grid reached the encoder"
    return item.grid
