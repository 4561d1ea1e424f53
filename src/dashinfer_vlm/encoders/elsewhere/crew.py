"""Encoders elsewhere and their life: each is held by one thread that starts it, feeds it and replaces it when it dies.

What an encoder is (a child process, an actor on another machine) is known to its `Encoder` alone.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from dashinfer_vlm.errors import ConfigError, DashInferError, EngineError
from dashinfer_vlm.request import Item

log = logging.getLogger(__name__)

IDLE_CHECK_S = 0.5
"""How often a thread without work looks whether its encoder still lives."""
FIRST_BACK_OFF_S = 0.1
MAX_BACK_OFF_S = 30.0
PLACE_CHECK_S = 1.0
"""How often a thread without a place looks for one."""
MAX_FAILED_STARTS = 3
"""After this many in a row nobody waits for this encoder any more; it is still tried."""
CLOSE_TIMEOUT_S = 10.0


class EncoderDiedError(EngineError):
    """The encoder is gone, and what it was working on with it."""


class EncodeRefusedError(EngineError):
    """The encoder is well, but could not encode these items."""


class NoPlaceError(EngineError):
    """There is no room for the encoder now; somebody may come and offer some."""


class Encoder(Protocol):
    """One encoder elsewhere. All calls come from one thread, `interrupt` from any."""

    def start(self) -> None:
        """Come up, or raise: ConfigError for a setting that is wrong, NoPlaceError while there is no room for it,
        EngineError or OSError for anything else."""
        ...

    def is_alive(self) -> bool: ...

    def encode(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """One [tokens_i, hidden] per item; raises EncodeRefusedError or EncoderDiedError."""
        ...

    def interrupt(self) -> None:
        """Make a `start` or `encode` that is under way raise soon; the encoder may be lost by it."""
        ...

    def stop(self) -> None:
        """End it, whatever state it is in; idempotent. It may be started again."""
        ...


class State(Enum):
    """`AWAY`: it did not come up, or its place is not there yet; tried again and again."""

    STARTING = "starting"
    READY = "ready"
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Encoded:
    items: list[Item]
    embeddings: list[torch.Tensor]
    seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    items: list[Item]
    error: EncodeRefusedError


@dataclass(frozen=True, slots=True)
class Lost:
    items: list[Item]


Outcome = Encoded | Refused | Lost


class _Post:
    """One encoder, its state and its thread."""

    def __init__(self, encoder: Encoder, run: Callable[[_Post], None], name: str) -> None:
        self.encoder = encoder
        self.state = State.STARTING
        self.tried = threading.Event()
        """The first start has come to an end."""
        self.error: Exception | None = None
        self.num_starts = 0
        self.num_troubles = 0
        """Deaths and failed starts since it last finished a batch."""
        self.thread = threading.Thread(target=run, args=(self,), name=name, daemon=True)

    @property
    def back_off_s(self) -> float:
        """How long to wait before the next start."""
        if self.num_troubles:
            return min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** (self.num_troubles - 1))
        return PLACE_CHECK_S if self.state is State.AWAY else 0.0


class Crew:
    """Several encoders behind one list of batches. `submit` and the rest belong to the engine's thread."""

    def __init__(self, encoders: Sequence[Encoder], *, on_close: Callable[[], None] = lambda: None) -> None:
        self._batches: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._on_close = on_close
        self._posts = [_Post(encoder, self._run, f"encoder-{i}") for i, encoder in enumerate(encoders)]
        for post in self._posts:
            post.thread.start()
        atexit.register(self.close)

    @property
    def encoders(self) -> list[Encoder]:
        """All of them, whatever state they are in."""
        return [post.encoder for post in self._posts]

    @property
    def num_ready(self) -> int:
        return sum(post.state is State.READY for post in self._posts)

    @property
    def num_starting(self) -> int:
        """Those that may be there soon."""
        return sum(post.state is State.STARTING for post in self._posts)

    @property
    def num_restarts(self) -> int:
        """Encoders that were started in place of another one."""
        return sum(max(0, post.num_starts - 1) for post in self._posts)

    def wait_started(self, timeout_s: float) -> None:
        """Until every first start has come to an end. Closes the crew and raises ConfigError for a wrong setting."""
        deadline = time.monotonic() + timeout_s
        for post in self._posts:
            post.tried.wait(max(0.0, deadline - time.monotonic()))
        for post in self._posts:
            if isinstance(post.error, ConfigError):
                self.close()
                raise post.error

    def submit(self, items: list[Item]) -> None:
        """Encode a batch; its one outcome comes from `outcomes`, unless `take_back` returns it."""
        self._batches.put(items)

    def take_back(self) -> list[list[Item]]:
        """Batches that no encoder has begun."""
        batches = []
        while (items := self._next_batch(0)) is not None:
            batches.append(items)
        return batches

    def outcomes(self, wait_s: float) -> list[Outcome]:
        """What has come of batches; waits up to `wait_s` for the first."""
        found: list[Outcome] = []
        try:
            found.append(self._outcomes.get(block=wait_s > 0, timeout=wait_s or None))
            while True:
                found.append(self._outcomes.get_nowait())
        except queue.Empty:
            return found

    def close(self) -> None:
        """End all encoders; batches that are left have no outcome. Idempotent."""
        atexit.unregister(self.close)
        self._closing.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for post in self._posts:
            while post.thread.is_alive() and time.monotonic() < deadline:
                post.encoder.interrupt()
                post.thread.join(0.1)
        self._on_close()

    def _run(self, post: _Post) -> None:
        try:
            while not self._closing.wait(post.back_off_s):
                if self._start(post):
                    self._work(post)
                    post.state = State.STARTING
        finally:
            post.state = State.AWAY
            post.tried.set()
            post.encoder.stop()

    def _start(self, post: _Post) -> bool:
        try:
            post.encoder.start()
        except NoPlaceError as error:
            if post.state is not State.AWAY and not self._closing.is_set():
                log.info("%s waits for a place: %s", post.thread.name, error)
            post.state = State.AWAY
        except (DashInferError, OSError) as error:
            post.num_troubles += 1
            post.error = error
            if post.num_troubles >= MAX_FAILED_STARTS or not post.tried.is_set():
                post.state = State.AWAY
            if not self._closing.is_set():
                log.warning("%s does not start, to be tried again: %s", post.thread.name, error)
        else:
            post.error = None
            post.num_starts += 1
            post.state = State.READY
        post.tried.set()
        return post.state is State.READY

    def _work(self, post: _Post) -> None:
        """Encode batches until the encoder is gone."""
        while not self._closing.is_set():
            items = self._next_batch(IDLE_CHECK_S)
            if not post.encoder.is_alive():
                post.num_troubles += 1
                if items is not None:
                    self._batches.put(items)
                if not self._closing.is_set():
                    log.warning("%s has ended and is started again", post.thread.name)
                return
            if items is not None and not self._encode(post, items):
                return

    def _encode(self, post: _Post, items: list[Item]) -> bool:
        """Whether the encoder has survived it."""
        start = time.perf_counter()
        try:
            embeddings = post.encoder.encode(items)
        except EncodeRefusedError as error:
            self._outcomes.put(Refused(items, error))
        except EncoderDiedError as error:
            post.num_troubles += 1
            post.state = State.STARTING  # before its batch is tried again
            if not self._closing.is_set():
                log.warning("%s died over %d items: %s", post.thread.name, len(items), error)
            self._outcomes.put(Lost(items))
            return False
        except Exception as error:  # the batch must come back, whatever went wrong on the way
            log.exception("%s failed on %d items", post.thread.name, len(items))
            self._outcomes.put(Refused(items, EncodeRefusedError(f"{type(error).__name__}: {error}")))
        else:
            self._outcomes.put(Encoded(items, embeddings, time.perf_counter() - start))
            post.num_troubles = 0
        return True

    def _next_batch(self, wait_s: float) -> list[Item] | None:
        try:
            return self._batches.get(block=wait_s > 0, timeout=wait_s or None)
        except queue.Empty:
            return None
