"""Where the tokens of a request are fetched from."""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from dashinfer_vlm.errors import EngineError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Finish, Output

__all__ = ["GenerateRequestStatus", "GeneratedElements", "ResultQueue"]


class GenerateRequestStatus(enum.IntEnum):
    """How far a request has come."""

    Init = 0
    """No token yet."""
    ContextFinished = 1
    """The prompt is computed and the first token is there."""
    Generating = 2
    GenerateFinished = 3
    """Ended by itself: an end-of-sequence token, a stop sequence or the length limit."""
    GenerateInterrupted = 4
    """Ended by stop_request, release_request or stop_model; tokens so far can still be fetched."""
    InternalError = 5
    """Ended by a failure of the engine; tokens so far can still be fetched."""


@dataclass(kw_only=True)
class GeneratedElements:
    """Tokens that came since the last fetch, one or more."""

    ids_from_generate: list[int] = field(default_factory=list)
    log_probs_list: list[list[tuple[int, float]]] = field(default_factory=list)
    """Per token the likeliest ids with their log probabilities, when `top_logprobs` asks for them."""
    token_logprobs_list: list[float] = field(default_factory=list)
    """Per token its own log probability, when `logprobs` asks for it."""
    prefix_cache_len: int = 0
    """Input tokens that were not computed because an earlier request began with them."""


_ENDINGS = {
    "stop": GenerateRequestStatus.GenerateFinished,
    "length": GenerateRequestStatus.GenerateFinished,
    "abort": GenerateRequestStatus.GenerateInterrupted,
    "error": GenerateRequestStatus.InternalError,
}


class ResultQueue:
    """The output of one request. Outlives the request's release; may be used from any thread.

    The end is told only when every token has been fetched, so that a loop which fetches until the status says that the
    request has ended misses none. Who has waited with `Engine.sync_request` is told at once.
    """

    def __init__(self, num_prompt_tokens: int = 0) -> None:
        self._changed = threading.Condition()
        self._news = GeneratedElements()
        self._num_prompt = num_prompt_tokens
        self._num_generated = 0
        self._finish: Finish | None = None
        self._synced = False
        self._failure_told = False
        self._arrival_s = time.time()
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._finish_s: float | None = None

    def Get(self) -> GeneratedElements | None:  # noqa: N802
        """All tokens since the last fetch; waits until there is one. None once the request has ended.

        After a failure of the engine was told by None and the status InternalError, the next call raises
        EngineError with its reason: a loop that waits for GenerateFinished alone must not spin forever.
        """
        return self._fetch(None)

    def GetWithTimeout(self, timeout_ms: float) -> GeneratedElements | None:  # noqa: N802
        """`Get` that waits for at most `timeout_ms` milliseconds; None when they have passed."""
        if not timeout_ms >= 0:  # also for NaN
            raise ValueError(f"timeout_ms is {timeout_ms}; it must be 0 or more")
        return self._fetch(min(timeout_ms / 1000, threading.TIMEOUT_MAX))

    def GetNoWait(self) -> GeneratedElements | None:  # noqa: N802
        """`Get` that does not wait; None when there is nothing new."""
        return self._fetch(0)

    def GenerateStatus(self) -> GenerateRequestStatus:  # noqa: N802
        """How far the request has come; does not wait."""
        with self._changed:
            if self._finish and (self._synced or not self._news.ids_from_generate):
                return _ENDINGS[self._finish.reason]
            if self._num_generated == 0:
                return GenerateRequestStatus.Init
            return (
                GenerateRequestStatus.ContextFinished if self._num_generated == 1 else GenerateRequestStatus.Generating
            )

    def GeneratedLength(self) -> int:  # noqa: N802
        """Tokens generated so far, fetched or not."""
        with self._changed:
            return self._num_generated

    def RequestStatInfo(self) -> dict[str, Any]:  # noqa: N802
        """Numbers so far. Times are milliseconds since the epoch, durations milliseconds, 0 where not reached yet."""
        with self._changed:
            context_s = _span(self._arrival_s, self._first_s)
            generate_s = _span(self._first_s, self._last_s)
            return {
                "arrival_time": self._arrival_s * 1000,
                "first_token_time": (self._first_s or 0) * 1000,
                "last_token_time": (self._last_s or 0) * 1000,
                "time_to_first_token": context_s * 1000,
                "finished_time": _span(self._arrival_s, self._finish_s) * 1000,
                "context_token_length": self._num_prompt,
                "generated_token_length": self._num_generated,
                "context_cached_length": self._news.prefix_cache_len,
                "context_tps": self._num_prompt / context_s if context_s else 0.0,
                "generate_tps": (self._num_generated - 1) / generate_s if generate_s else 0.0,
            }

    def feed(self, news: Output | Fault) -> None:
        """The engine's side: the next output of the request, or why it was refused."""
        with self._changed:
            if isinstance(news, Fault):
                news = Output("", finish=Finish("error", None, news.message))
            self._take(news)
            self._changed.notify_all()

    def wait_ended(self) -> Finish:
        """Until the request has ended; its end is then told whether or not the tokens were fetched."""
        with self._changed:
            self._changed.wait_for(lambda: self._finish)
            self._synced = True
            assert self._finish is not None
            return self._finish

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._finish is not None

    def _take(self, output: Output) -> None:
        now_s = time.time()
        if output.token_ids:
            self._first_s = self._first_s or now_s
            self._last_s = now_s
        self._num_generated += len(output.token_ids)
        self._news.ids_from_generate += output.token_ids
        self._news.token_logprobs_list += [row.logprob for row in output.logprobs]
        self._news.log_probs_list += [list(row.top) for row in output.logprobs]
        self._news.prefix_cache_len = max(self._news.prefix_cache_len, output.num_cached_tokens)
        if output.finish:
            self._finish = output.finish
            self._finish_s = now_s

    def _fetch(self, timeout_s: float | None) -> GeneratedElements | None:
        with self._changed:
            self._changed.wait_for(lambda: self._news.ids_from_generate or self._finish, timeout_s)
            if self._news.ids_from_generate:
                news, self._news = self._news, GeneratedElements(prefix_cache_len=self._news.prefix_cache_len)
                return news
            self._tell_failure()
            return None

    def _tell_failure(self) -> None:
        if self._finish and self._finish.reason == "error":
            if self._failure_told:
                raise EngineError(self._finish.message or "the engine gave up on this request")
            self._failure_told = True


def _span(start_s: float | None, end_s: float | None) -> float:
    return end_s - start_s if start_s and end_s else 0.0
