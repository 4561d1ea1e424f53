"""Embeddings in Redis, where all machines of a model find them: two threads, so that no caller ever waits for it.

Redis is never needed. It may be away, slow or full of somebody else's values: then a question is answered with None,
what should be written is dropped, and a circuit breaker keeps off for a while. Values are checked byte for byte
(`embedding_bytes.py`) and never unpickled.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import urlsplit

import torch

from dashinfer_vlm.encoders.shared.embedding_bytes import VERSION, EmbeddingBytes, EmbeddingFormatError
from dashinfer_vlm.errors import ConfigError

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["Answer", "Breaker", "RedisCache"]

log = logging.getLogger(__name__)

R = TypeVar("R")

CONNECT_TIMEOUT_S = 0.05
READ_TIMEOUT_S = 0.2
"""Silence of the server that counts as failure: a request waits for the answer."""
WRITE_TIMEOUT_S = 2.0
"""For a whole embedding; nobody waits for it."""
FIRST_BACK_OFF_S = 0.5
MAX_BACK_OFF_S = 30.0
MAX_QUESTIONS = 1024
MAX_KEYS = 8
"""Of one MGET: its values are in memory together."""
MAX_UNWRITTEN_BYTES = 256 << 20
CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What Redis had under a content hash: `[tokens, hidden]` on the CPU, or None, for whatever reason."""

    content_hash: bytes
    embedding: torch.Tensor | None


@dataclass(slots=True)
class Lane:
    """Counters of one direction, written by its thread alone."""

    num_bytes: int = 0
    num_errors: int = 0


class Breaker:
    """Keeps one thread off a server that fails: after each failure in a row for twice as long, up to a limit, with
    jitter so that many machines do not come back at once. One log line when it opens and one when it closes."""

    def __init__(self, what: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self.what = what
        self._now = now
        self._num_failures = 0
        self._closed_until_s = 0.0

    @property
    def allows(self) -> bool:
        return not self._num_failures or self._now() >= self._closed_until_s

    def failed(self, error: Exception) -> None:
        back_off_s = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(self._num_failures, 16))
        self._closed_until_s = self._now() + back_off_s * random.uniform(0.5, 1.0)
        if not self._num_failures:
            log.warning("%s fails (%s); going on without it, trying again now and then", self.what, error)
        self._num_failures += 1

    def succeeded(self) -> None:
        if self._num_failures:
            log.info("%s works again after %d failures", self.what, self._num_failures)
        self._num_failures = 0


class RedisCache:
    """Questions and writes are queued and return at once; answers are collected. `close` it.

    The queues are bounded: a question too many is not asked, a write too many is dropped.
    """

    def __init__(self, url: str, packing: EmbeddingBytes, *, ttl_s: int) -> None:
        """Connects to nothing yet. Raises ConfigError for a URL that cannot be used or when redis is not installed."""
        self._packing = packing
        self._ttl_s = ttl_s
        self._prefix = f"dashinfer:embedding:{VERSION}:{packing.model_id.hex()[:32]}:".encode()
        where = _without_password(url)
        self.reads, self.writes = Lane(), Lane()
        self.num_dropped = 0
        """Writes that found the queue full, or Redis away."""
        self._questions: queue.SimpleQueue[tuple[bytes, int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._unwritten: queue.SimpleQueue[tuple[bytes, torch.Tensor] | None] = queue.SimpleQueue()
        self._unwritten_bytes = 0
        self._lock = threading.Lock()  # of `_unwritten_bytes` and `num_dropped`
        lanes = (
            (self._read, connect(url, READ_TIMEOUT_S), Breaker(f"reading from the shared cache {where}")),
            (self._write, connect(url, WRITE_TIMEOUT_S), Breaker(f"writing to the shared cache {where}")),
        )
        self._threads = [threading.Thread(target=run, args=(client, b), daemon=True) for run, client, b in lanes]
        for thread in self._threads:
            thread.start()

    def ask(self, content_hash: bytes, num_tokens: int) -> bool:
        """Ask for an embedding; its Answer comes from `answers`. False: too many are asked already, none will come."""
        if self._questions.qsize() >= MAX_QUESTIONS:
            return False
        self._questions.put((content_hash, num_tokens))
        return True

    def answers(self, wait_s: float) -> list[Answer]:
        """All that have come, waiting up to `wait_s` for the first."""
        found: list[Answer] = []
        try:
            found.append(self._answers.get(block=wait_s > 0, timeout=wait_s or None))
            while True:
                found.append(self._answers.get_nowait())
        except queue.Empty:
            return found

    def put(self, content_hash: bytes, embedding: torch.Tensor) -> None:
        """Write when there is time; the tensor must not change any more."""
        with self._lock:
            if self._unwritten_bytes + embedding.nbytes > MAX_UNWRITTEN_BYTES:
                self.num_dropped += 1
                return
            self._unwritten_bytes += embedding.nbytes
        self._unwritten.put((content_hash, embedding))

    def close(self) -> None:
        """Write what is queued if Redis is quick, then end; idempotent."""
        self._questions.put(None)
        self._unwritten.put(None)
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    # The two threads

    def _read(self, client: Redis, breaker: Breaker) -> None:
        while questions := self._next_questions():
            for (content_hash, num_tokens), value in zip(
                questions, self._values(client, breaker, questions), strict=True
            ):
                self._answers.put(Answer(content_hash, self._checked(content_hash, num_tokens, value)))
        client.close()

    def _next_questions(self) -> list[tuple[bytes, int]]:
        """Up to MAX_KEYS; none when closed."""
        questions: list[tuple[bytes, int]] = []
        while len(questions) < MAX_KEYS and not (questions and self._questions.empty()):
            question = self._questions.get()
            if question is None:
                return []
            questions.append(question)
        return questions

    def _values(self, client: Redis, breaker: Breaker, questions: list[tuple[bytes, int]]) -> list[bytes | None]:
        if breaker.allows:
            keys = [self._key(content_hash) for content_hash, _ in questions]
            values = _guarded(lambda: client.mget(keys), breaker, self.reads)
            if values is not None:
                return cast("list[bytes | None]", values)
        return [None] * len(questions)

    def _checked(self, content_hash: bytes, num_tokens: int, value: bytes | None) -> torch.Tensor | None:
        if value is None:
            return None
        self.reads.num_bytes += len(value)
        try:
            return self._packing.unpack(content_hash, num_tokens, value)
        except EmbeddingFormatError as error:
            self.reads.num_errors += 1
            log.warning("an embedding of the shared cache is not used: %s", error)
            return None

    def _write(self, client: Redis, breaker: Breaker) -> None:
        while (entry := self._unwritten.get()) is not None:
            content_hash, embedding = entry
            written = breaker.allows and self._set(client, breaker, content_hash, embedding)
            with self._lock:
                self._unwritten_bytes -= embedding.nbytes
                self.num_dropped += not written
        client.close()

    def _set(self, client: Redis, breaker: Breaker, content_hash: bytes, embedding: torch.Tensor) -> bool:
        data = self._packing.pack(content_hash, embedding)
        done = _guarded(lambda: client.set(self._key(content_hash), data, ex=self._ttl_s), breaker, self.writes)
        self.writes.num_bytes += len(data) if done else 0
        return bool(done)

    def _key(self, content_hash: bytes) -> bytes:
        return self._prefix + content_hash.hex().encode()


def connect(url: str, timeout_s: float) -> Redis:
    """A client that connects at its first command and tries nothing twice. Raises ConfigError."""
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        hint = "pip install 'dashinfer-vlm[redis]'"
        raise ConfigError(f"--vision-cache needs the client of Redis, which is not installed: {hint}") from error
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        protocol=2,  # nothing is asked of a new connection that an older server would not know
    )


def _guarded(command: Callable[[], R], breaker: Breaker, lane: Lane) -> R | None:
    """The command's result; None when it fails, which the breaker and the lane's counter learn."""
    from redis import RedisError

    try:
        result = command()
    except (RedisError, OSError) as error:
        lane.num_errors += 1
        breaker.failed(error)
        return None
    breaker.succeeded()
    return result


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}{parts.path}"
