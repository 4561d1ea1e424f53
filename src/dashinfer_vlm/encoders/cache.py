"""Embeddings by content: a byte budget, least recently used goes first, what a sequence still needs never goes."""

from __future__ import annotations

from collections import Counter, OrderedDict

import torch

from dashinfer_vlm.stages import Span


class EmbeddingCache:
    """Maps an item's content hash to its embedding `[tokens, hidden]`.

    A *pinned* entry belongs to at least one sequence that has rows of it to compute; only unpinned entries count as
    evictable, so the cache may exceed its budget by what running sequences need at once.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._spans: dict[bytes, tuple[Span, ...]] = {}  # of entries that were encoded by this engine
        self._pins: Counter[bytes] = Counter()

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> torch.Tensor | None:
        """The embedding, now the most recently used; None when it is not here."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def spans(self, key: bytes) -> tuple[Span, ...]:
        """How the embedding was made."""
        return self._spans.get(key, ())

    def put(self, key: bytes, embedding: torch.Tensor, spans: tuple[Span, ...] = ()) -> None:
        """Keep it as most recently used. A part of a larger tensor is copied: it would keep the whole in memory."""
        if key not in self._entries:
            self._spans[key] = spans
            part = embedding.untyped_storage().nbytes() > embedding.nbytes
            self._entries[key] = embedding.clone() if part else embedding
            self.num_bytes += embedding.nbytes
        self._evict()

    def pin(self, key: bytes) -> None:
        """Keep `key` (present or still to come) until as many `unpin` calls."""
        self._pins[key] += 1

    def unpin(self, key: bytes) -> None:
        assert self._pins[key] > 0, "unpinned more often than pinned"
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._evict()

    def is_pinned(self, key: bytes) -> bool:
        return key in self._pins

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(e.nbytes for e in self._entries.values()), "the byte count is off"
        evictable = [key for key in self._entries if key not in self._pins]
        assert self.num_bytes <= self.max_bytes or not evictable, "over budget with something to evict"
        assert self._spans.keys() == self._entries.keys(), "times of what is not here"

    def _evict(self) -> None:
        if self.num_bytes <= self.max_bytes:
            return
        for key in [key for key in self._entries if key not in self._pins]:
            self.num_bytes -= self._entries.pop(key).nbytes
            del self._spans[key]
            if self.num_bytes <= self.max_bytes:
                return
