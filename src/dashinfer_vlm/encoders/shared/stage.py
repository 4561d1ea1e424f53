"""The second level of the embedding cache, in front of any encoder stage: what other machines have encoded already.

    request ──► own cache? ──no──► shared cache? ──no, or no answer in time──► the inner stage encodes ──► shared cache

Each content is asked for once, whoever wants it. The shared cache can only save work: whatever goes wrong with it is
a miss.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import msgspec
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.shared.embedding_bytes import EmbeddingBytes
from dashinfer_vlm.encoders.shared.redis_cache import Answer, RedisCache
from dashinfer_vlm.encoders.stage import EncoderStage
from dashinfer_vlm.encoders.stats import StageStats
from dashinfer_vlm.models.base import Model, embedding_row_bytes
from dashinfer_vlm.models.identity import encoder_identity
from dashinfer_vlm.request import Item

__all__ = ["SharedCacheStage", "with_shared_cache"]

ANSWER_TIMEOUT_S = 0.3
"""Until the first byte of an answer; then encoding starts without it."""
SLOWEST_BYTES_PER_S = 20e6
"""A large embedding is waited for as long as a network of this speed needs to carry it."""
MAX_WAIT_S = 0.005
WAIT_SHARE = 0.01
"""Waiting for an answer when there is nothing else to do, as a share of the step's budget; no stream would feel it."""


@dataclass(slots=True)
class _Question:
    item: Item
    num_waiting: int
    """Requests that the answer is for; the items of one content are interchangeable."""
    deadline_s: float


class SharedCacheStage:
    """An EncoderStage that asks `redis` before it lets `inner` encode, and tells it what came out."""

    def __init__(self, inner: EncoderStage, redis: RedisCache, *, device: torch.device, row_bytes: int) -> None:
        """`row_bytes` is the size of one token's embedding."""
        self.inner = inner
        self._redis = redis
        self._device = device
        self._row_bytes = row_bytes
        self._questions: dict[bytes, _Question] = {}
        self._given_to_inner: Counter[bytes] = Counter()  # requests that `inner` must see released
        self._encoding: set[bytes] = set()  # not in the shared cache, so to be written once they are encoded
        self._hits = self._misses = 0

    @property
    def cache(self) -> EmbeddingCache:
        return self.inner.cache

    @property
    def stats(self) -> StageStats:
        redis = self._redis
        return msgspec.structs.replace(
            self.inner.stats,
            shared_cache_hits_total=self._hits,
            shared_cache_misses_total=self._misses,
            shared_cache_read_bytes_total=redis.reads.num_bytes,
            shared_cache_written_bytes_total=redis.writes.num_bytes,
            shared_cache_errors_total=redis.reads.num_errors + redis.writes.num_errors,
            shared_cache_dropped_total=redis.num_dropped,
        )

    def request(self, item: Item) -> None:
        key, cache = item.content_hash, self.cache
        if key in cache:
            cache.hits += 1
            cache.get(key)
            cache.pin(key)
        elif key in self._given_to_inner:
            self._give_to_inner(item)
        elif key in self._questions:
            self._questions[key].num_waiting += 1
            cache.pin(key)
        else:
            self._ask(item)

    def release(self, item: Item) -> None:
        key = item.content_hash
        if key in self._given_to_inner:
            self._take_from_inner(item)
            return
        self.cache.unpin(key)
        question = self._questions.get(key)
        if question is not None:
            question.num_waiting -= 1
            if not question.num_waiting:
                del self._questions[key]  # an answer that still comes is not wanted

    def has_work(self) -> bool:
        return bool(self._questions) or self.inner.has_work()

    @property
    def computes_here(self) -> bool:
        return self.inner.computes_here

    def advance(self, budget_s: float) -> None:
        """Collect answers, let the inner stage work, pass on what it has encoded."""
        wait_s = 0.0 if self.inner.has_work() else min(MAX_WAIT_S, WAIT_SHARE * budget_s)
        self._collect(wait_s)
        if self.inner.has_work():
            self.inner.advance(budget_s)
        self._write()

    def take_failures(self) -> dict[bytes, str]:
        failures = self.inner.take_failures()
        self._encoding -= failures.keys()
        return failures

    def close(self) -> None:
        self.inner.close()
        self._redis.close()

    def _ask(self, item: Item) -> None:
        key = item.content_hash
        if not self._redis.ask(key, item.num_rows):
            self._misses += 1
            self._encode(item, 1)
            return
        transfer_s = item.num_rows * self._row_bytes / SLOWEST_BYTES_PER_S
        self._questions[key] = _Question(item, 1, time.monotonic() + ANSWER_TIMEOUT_S + transfer_s)
        self.cache.pin(key)

    def _collect(self, wait_s: float) -> None:
        for answer in self._redis.answers(wait_s if self._questions else 0.0):
            self._settle(answer)
        now = time.monotonic()
        for key in [key for key, question in self._questions.items() if now >= question.deadline_s]:
            self._settle(Answer(key, None))

    def _settle(self, answer: Answer) -> None:
        """Everyone who waits gets the embedding, or goes to the inner stage."""
        key = answer.content_hash
        question = self._questions.pop(key, None)
        if question is None:
            return
        if answer.embedding is not None:
            self._hits += 1
            self.cache.misses += 1
            self.cache.hits += question.num_waiting - 1
            self.cache.put(key, answer.embedding.to(self._device, non_blocking=True))
            return
        self._misses += 1
        self._encode(question.item, question.num_waiting)
        for _ in range(question.num_waiting):
            self.cache.unpin(key)

    def _encode(self, item: Item, num_requests: int) -> None:
        self._encoding.add(item.content_hash)
        for _ in range(num_requests):
            self._give_to_inner(item)

    def _give_to_inner(self, item: Item) -> None:
        self._given_to_inner[item.content_hash] += 1
        self.inner.request(item)

    def _take_from_inner(self, item: Item) -> None:
        key = item.content_hash
        self.inner.release(item)
        self._given_to_inner[key] -= 1
        if not self._given_to_inner[key]:
            del self._given_to_inner[key]
            self._encoding.discard(key)

    def _write(self) -> None:
        for key in [key for key in self._encoding if key in self.cache]:
            self._encoding.discard(key)
            embedding = self.cache.get(key)
            assert embedding is not None
            self._redis.put(key, embedding)


def with_shared_cache(stage: EncoderStage, model: Model, config: EngineConfig) -> EncoderStage:
    """`stage` behind the Redis that `config.vision_cache` names; the stage itself without one.

    Raises ConfigError when it cannot be used, but not when it does not answer.
    """
    if config.vision_cache is None:
        return stage
    model_id = encoder_identity(config, model.activation_dtype)
    packing = EmbeddingBytes(model_id, model.embedding_size, model.activation_dtype)
    redis = RedisCache(config.vision_cache, packing, ttl_s=config.vision_cache_ttl_s)
    return SharedCacheStage(stage, redis, device=model.device, row_bytes=embedding_row_bytes(model))
