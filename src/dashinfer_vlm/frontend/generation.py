"""The answers to one call, as they are made: engine outputs turned into text, side by side for all choices."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.errors import DeadlineError, EngineDeadError, OverloadedError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.frontend.booking import Booking
from dashinfer_vlm.frontend.choice import Choice
from dashinfer_vlm.frontend.deltas import Delta, Usage
from dashinfer_vlm.frontend.observer import CallReport, Observer
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.prompt import Prompt
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import Output, Request, TokenLogprob

_MERGED_TOKENS = 64
"""Tokens of a delta, at most a few more, so that writing one takes no time that others would notice."""
OUT_OF_TIME = "the answer was not complete in the time that the request gave for it"
MAX_UNREAD_BYTES = 32 << 20
"""Of what a call may hold that its reader has not read: a reader this far behind does not read at all."""


class Generation:
    """All choices of a call, as an asynchronous iterator of deltas in the order in which they are made.

    `close()` stops what still runs; it must be called when the deltas are not read to their end. An error of one
    choice ends all of them and is raised from the iterator. The booking ends after the engine's last word on every
    choice.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        params: GenerationParams,
        booking: Booking,
        observer: Observer,
        started_s: float,
        timeout_s: float | None = None,
        *,
        wants_vectors: bool = False,
    ) -> None:
        """`booking` is told what is used, and when it ends. Who still iterates after `timeout_s` from now is told
        DeadlineError. `started_s` is when the caller asked, on `time.perf_counter`'s clock."""
        self._engine = engine
        self._wants_vectors = wants_vectors
        self._observer = observer
        self._started_s = started_s
        self._prompts = tuple(prompts)
        self._booking = booking
        self._news: deque[Delta | BaseException] = deque()
        self._num_unread_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        """Who iterates, while all news is read and it waits for more or for the end."""
        self.shortcut: Callable[[Delta], bool] | None = None
        """Is offered what comes while who iterates waits, and says whether it has taken it: then nobody is woken."""
        self._num_choices = params.n
        self.choices = [Choice(i, prompts[i // params.n], params, tokenizer) for i in range(len(prompts) * params.n)]
        self._id = secrets.token_hex(8)
        self._unfinished = "abort"
        """Why choices have ended that have not come to their end."""
        self._ended = asyncio.Event()
        self._timer = None if timeout_s is None else asyncio.get_running_loop().call_later(timeout_s, self._time_is_up)
        self._running = dict.fromkeys(self.choices)
        for choice in self.choices:
            self._ask(choice)

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the iterator has ended."""
        cached: dict[int, int] = {}  # of choices of one prompt each finds what the first one has computed
        for choice in self.choices:
            found = choice.num_cached_tokens
            cached[id(choice.prompt)] = min(cached.get(id(choice.prompt), found), found)
        return Usage(
            sum(len(prompt.ids) for prompt in self._prompts),
            sum(choice.num_tokens for choice in self.choices),
            sum(cached.values()),
            sum(choice.num_reasoning_tokens for choice in self.choices),
        )

    def prompt_logprobs(self, index: int) -> tuple[TokenLogprob, ...]:
        """Of the prompt of choice `index`, whose first choice has asked for them; whole once the choice has begun."""
        return tuple(self.choices[index - index % self._num_choices].prompt_logprobs)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        while not self._news:
            if self._ended.is_set():
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        news = self._next()
        while (following := self._mergeable(news)) is not None:
            news = news.merge(following)  # a reader that is slower than the engine gets longer pieces
            self._next()
        return news

    def _next(self) -> Delta:
        news = self._news.popleft()
        if isinstance(news, BaseException):
            self.close()
            raise news
        self._num_unread_bytes -= news.num_bytes
        return news

    def _mergeable(self, news: Delta) -> Delta | None:
        """What follows `news`, where both can be one."""
        following = self._news[0] if self._news else None
        if not isinstance(following, Delta) or following.index != news.index:
            return None
        return following if len(news.token_ids) < _MERGED_TOKENS else None

    def close(self, error: Exception | None = None) -> None:
        """Abort what still runs, without waiting for it; idempotent. Who still iterates is told `error`."""
        if error is not None and not self._ended.is_set():
            self._queue(error)
        for choice in tuple(self._running):
            self._end(choice)

    def _time_is_up(self) -> None:
        self._unfinished = "timeout"
        self.close(DeadlineError(OUT_OF_TIME))

    async def wait_ended(self) -> None:
        """Until the engine has spoken its last word and everything is given back."""
        await self._ended.wait()

    def _ask(self, choice: Choice) -> None:
        request = Request(
            id=self._request_id(choice),
            prompt_ids=choice.prompt.ids,
            params=choice.sampling,
            items=choice.prompt.items,
            priority=self._booking.tenant.priority(choice.priority),
            cache_salt=self._booking.tenant.salted(choice.cache_salt),
            tenant=self._booking.tenant.id,
            weight=self._booking.tenant.weight,
            wants_vector=self._wants_vectors,
        )
        try:
            self._engine.ask(request, partial(self._hear, choice))
        except Exception as error:  # noqa: BLE001  who iterates is told
            asyncio.get_running_loop().call_soon(self._fail, choice, error)

    def _request_id(self, choice: Choice) -> str:
        return f"{self._id}-{choice.index}"

    def _hear(self, choice: Choice, news: Output | Fault) -> None:
        """What the engine says of a choice; one that has ended hears no more."""
        if choice not in self._running:
            return
        try:
            if isinstance(news, Fault):
                raise news.error()
            if news.finish and news.finish.reason == "error" and not self._engine.alive():
                raise EngineDeadError("the engine has stopped")
            if news.vector:
                self._booking.used(0)  # what it has waited for has come
            if delta := choice.feed(news):
                self._observe(choice, delta)
                self._tell(delta)
            if choice.end_reason:
                self._end(choice)
        except Exception as error:  # noqa: BLE001  the engine's other listeners are not to blame
            self._fail(choice, error)

    def _fail(self, choice: Choice, error: Exception) -> None:
        if choice in self._running:
            self._unfinished = "error"
            self._queue(error)
            self._end(choice)

    def _tell(self, news: Delta) -> None:
        if self._reader is not None and self.shortcut is not None and self.shortcut(news):
            return
        self._queue(news)
        self._num_unread_bytes += news.num_bytes
        if self._num_unread_bytes > MAX_UNREAD_BYTES:
            self._forget_reader()

    def _queue(self, news: Delta | BaseException) -> None:
        self._news.append(news)
        self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():  # it may be cancelled
            reader.set_result(None)

    def _forget_reader(self) -> None:
        self._news.clear()
        self._num_unread_bytes = 0
        message = f"more than {MAX_UNREAD_BYTES} bytes of the answer wait to be read; read it as it comes"
        self.close(OverloadedError(message, reason="unread_answer"))

    def _observe(self, choice: Choice, delta: Delta) -> None:
        if num_tokens := len(delta.token_ids):
            self._booking.used(num_tokens)
            now_s, first = time.perf_counter(), choice.last_token_s is None
            waited_s = now_s - (choice.last_token_s or self._started_s)
            self._observer.tokens(num_tokens, waited_s, first=first)
            choice.last_token_s = now_s
            choice.first_token_s = choice.first_token_s or now_s

    def _end(self, choice: Choice) -> None:
        """At a stop string, or when its reader goes, the engine is not done with it yet."""
        if choice not in self._running:
            return
        del self._running[choice]
        self._engine.leave(self._request_id(choice))
        if not self._running:
            self._ended.set()
            self._wake()
            if self._timer is not None:
                self._timer.cancel()
            self._booking.end()
            self._observer.ended(self.report())

    def report(self) -> CallReport:
        """What came of the call, or has so far."""
        usage = self.usage
        return CallReport(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_output_tokens=usage.num_output_tokens,
            sampling=self.choices[0].sampling,
            answers_per_prompt=self._num_choices,
            start_s=self._started_s,
            end_s=time.perf_counter(),
            spans=tuple(span for prompt in self._prompts for medium in prompt.media for span in medium.spans),
            answers=tuple(choice.report(self._unfinished) for choice in self.choices),
        )
