"""Grammars of one model: tried, compiled and kept, in threads of their own, so that no step waits for them."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import llguidance
import msgspec

from dashinfer_vlm.engine.grammars.forms import compile_for, complaint
from dashinfer_vlm.engine.grammars.matcher import Matcher
from dashinfer_vlm.engine.grammars.trial import Trial
from dashinfer_vlm.errors import OverloadedError, UnsupportedError
from dashinfer_vlm.request import Grammar
from dashinfer_vlm.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Compiler", "read_vocabulary"]

logger = logging.getLogger(__name__)

MAX_KEPT = 256
"""Compiled grammars and refusals; the least recently used goes first. A compiled one begins with a few kilobytes."""
MAX_WAITING = 64
"""Grammars that strangers may have to be compiled at a time; each may take seconds."""
_NUM_THREADS = 2
"""So that a grammar that is slow to compile does not keep the others waiting."""

_RETRY_S = 5

Kept = Future[llguidance.LLMatcher]


class Compiler:
    """Owns its threads and the processes in which grammars are tried: `close` ends them. Thread-safe."""

    def __init__(
        self,
        vocabulary: Callable[[], str],
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        *,
        max_waiting: float = math.inf,
    ) -> None:
        """With `max_waiting` grammars that are to be compiled, another one is refused.

        `vocabulary` gives the text of a `tokenizer.json` whose added tokens no answer may hold; it is called, and the
        masks' index of all tokens made of it, in a thread, at once: that takes a second for 150,000 tokens, during
        which Python's lock is held, so it should not happen later.
        """
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str, tuple[str, str] | None], Kept] = OrderedDict()
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammars")
        self._trials: queue.LifoQueue[Trial] = queue.LifoQueue()
        for _ in range(_NUM_THREADS):
            self._trials.put(Trial())
        self._tokenizer = self._pool.submit(_index, vocabulary, vocab_size, eos_token_ids)

    def prepare(self, grammar: Grammar) -> Kept:
        """Begin to compile, unless it is kept already. The future raises UnsupportedError with the reason why not; who
        no longer wants it may cancel it. Raises OverloadedError when too many are waiting."""
        key = (grammar.kind, grammar.text, grammar.thought)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None or not _is_kept(found):
                self._check_room()
                found = self._pool.submit(self._compile, grammar)
            self._kept[key] = found
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return found

    def matcher(self, grammar: Grammar, prepared: Kept | None = None) -> Matcher:
        """At the beginning of the grammar, which `prepare` may have been asked for; waits until it is compiled, and
        raises UnsupportedError if it cannot be."""
        try:
            return Matcher((prepared or self.prepare(grammar)).result().deep_copy())
        except UnsupportedError as error:  # it is kept for whoever sends the grammar, under whatever name
            raise UnsupportedError(str(error), param=grammar.param) from None

    def close(self) -> None:
        """Wait for what is being compiled, seconds at most. Idempotent."""
        self._pool.shutdown(cancel_futures=True)
        while not self._trials.empty():
            self._trials.get().close()

    def _check_room(self) -> None:
        num_waiting = sum(not kept.done() for kept in self._kept.values())
        if num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{num_waiting} grammars wait to be compiled, the limit is {self._max_waiting}; try again later",
                reason="queued_grammars",
                retry_after_s=_RETRY_S,
            )

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        try:
            tokenizer = self._tokenizer.result()
        except Exception as error:
            raise UnsupportedError(f"this model's tokenizer cannot be used for structured output: {error}") from error
        with self._trial() as trial:
            problem = trial.problem(grammar)
        if problem is not None:
            raise UnsupportedError(complaint(grammar, problem), param=grammar.param)
        try:
            return compile_for(tokenizer, grammar)
        except ValueError as error:
            raise UnsupportedError(complaint(grammar, str(error)), param=grammar.param) from error

    @contextmanager
    def _trial(self) -> Iterator[Trial]:
        trial = self._trials.get()
        try:
            yield trial
        finally:
            self._trials.put(trial)


def _is_kept(found: Kept) -> bool:
    """Whether it serves whoever asks for it again: a failure that is not the grammar's own may pass."""
    if found.cancelled():
        return False
    return not found.done() or found.exception() is None or isinstance(found.exception(), UnsupportedError)


def read_vocabulary(folder: Path) -> str:
    """The tokenizer of a model folder with every added token a special one. Raises CheckpointError or ConfigError."""
    file = TokenizerFile.read(folder)
    same = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": token.id, "content": token.text, **same} for token in sorted(file.added, key=lambda token: token.id)
    ]
    return file.json(msgspec.json.encode(added)).decode()


def _index(vocabulary: Callable[[], str], vocab_size: int, eos_token_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    try:
        return llguidance.LLTokenizer(vocabulary(), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except Exception:
        logger.warning("structured output is not available with this model's tokenizer", exc_info=True)
        raise
