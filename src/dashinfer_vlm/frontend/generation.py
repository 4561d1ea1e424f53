"""The answers to one call, as they are made: engine outputs turned into text, side by side for all choices."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.errors import DeadlineError, EngineDeadError, EngineError, OverloadedError
from dashinfer_vlm.frontend.answer_parser import TAGS, AnswerParser
from dashinfer_vlm.frontend.booking import Booking
from dashinfer_vlm.frontend.detokenizer import Detokenizer
from dashinfer_vlm.frontend.observer import AnswerReport, CallReport, Observer
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.pieces import Piece
from dashinfer_vlm.frontend.prompt import Prompt
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import Output, Request, TokenLogprob
from dashinfer_vlm.stages import Span

_MERGED_TOKENS = 64
"""Tokens of a delta, at most a few more, so that writing one takes no time that others would notice."""
OUT_OF_TIME = "the answer was not complete in the time that the request gave for it"
MAX_UNREAD_BYTES = 32 << 20
"""Of what a call may hold that its reader has not read: a reader this far behind does not read at all."""
_DELTA_BYTES, _ROW_BYTES, _TOP_BYTES = 350, 160, 120
"""What a delta of one token takes, each of its log probabilities, and each token in one; rounded from `tracemalloc`."""
EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new in one choice; the one with `finish_reason` is the choice's last."""

    index: int
    text: str
    """What the model wrote, in complete characters; empty while they are being put together."""
    pieces: tuple[Piece, ...] = ()
    """What that says; may be behind `text`, which may be about to say something else."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of `token_ids` when asked for; a token may precede its text."""
    finish_reason: EndReason | None = None
    end_ids: tuple[int, ...] = ()
    """The token that ended the choice, where one did; it is not among `token_ids`."""
    prompt_ids: Sequence[int] = ()
    """In the choice's first delta: the prompt."""
    stop: str | None = None
    """The stop string that ended the choice."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        rows = sum(_ROW_BYTES + _TOP_BYTES * len(row.top) for row in self.logprobs)
        return _DELTA_BYTES + len(self.text) + rows

    def merge(self, later: Delta) -> Delta:
        """Both as one; `later` is the next delta of the same choice."""
        return Delta(
            index=self.index,
            text=self.text + later.text,
            pieces=self.pieces + later.pieces,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            finish_reason=later.finish_reason,
            end_ids=later.end_ids,
            prompt_ids=self.prompt_ids,
            stop=later.stop,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a call. Each prompt counts once, however many answers were asked of it."""

    num_prompt_tokens: int
    num_output_tokens: int
    """The end-of-sequence token counts, as it was computed."""
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache, per prompt the most of its choices."""
    num_reasoning_tokens: int = 0
    """Those of the output that are reasoning."""


class Choice:
    """One answer on its way: engine outputs in, deltas out."""

    def __init__(self, index: int, prompt: Prompt, params: GenerationParams, tokenizer: Tokenizer) -> None:
        """`index` counts through all prompts of the call; each prompt has `params.n` choices."""
        self.index = index
        self.prompt = prompt
        self.sampling = params.of_choice(index % params.n)
        self.cache_salt = params.cache_salt
        self.priority = params.priority
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt but for its first token, where this choice asks for them."""
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0
        self.end_reason: EndReason | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        """When its latest token came, on `time.perf_counter`'s clock."""
        self._text_s = 0.0
        self._spans: list[Span] = []
        self._keeps_stop = params.include_stop_str_in_output
        self._text = Detokenizer(
            tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
            min_tokens=params.sampling.min_tokens,
            shown=() if prompt.form.is_plain else TAGS,
        )
        self._parser = AnswerParser(prompt.form)
        self._is_begun = False
        self._pieces: list[Piece] = []
        """Read, and not told yet."""

    def feed(self, output: Output) -> Delta | None:
        """The news in `output`, if any; raises EngineError when the engine gave up on the sequence."""
        start_s = time.perf_counter()
        try:
            self._spans += output.spans
            return self._feed(output)
        finally:
            self._text_s += time.perf_counter() - start_s

    def report(self, unfinished: str) -> AnswerReport:
        """What came of it, or has so far; `unfinished` is why one ends that has not come to its end."""
        end_s = self.last_token_s or time.perf_counter()
        text = Span("detokenise", end_s - self._text_s, end_s)  # the sum of what its tokens took
        return AnswerReport(
            reason=self.end_reason or unfinished,
            num_tokens=self.num_tokens,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            spans=(*self._spans, text) if self.num_tokens else tuple(self._spans),
        )

    def _feed(self, output: Output) -> Delta | None:
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.prompt_logprobs += output.prompt_logprobs
        text, num_used = self._push(output.token_ids)
        reason: EndReason | None = "stop" if self._text.stopped or self._parser.is_over else None
        end_ids: tuple[int, ...] = ()
        if reason is None and output.finish:
            reason = self._end_reason(output)
            text += self._last_text(output.finish.stop_token)
            end_ids = () if output.finish.stop_token is None else (output.finish.stop_token,)
        if reason is not None:
            self._pieces += self._parser.flush()
        if reason == "stop" and self._parser.num_calls:
            reason = "tool_calls"
        self.end_reason = reason
        if not text and reason is None and not output.token_ids:
            return None
        is_first, self._is_begun = not self._is_begun, True
        return Delta(
            index=self.index,
            text=text,
            pieces=self._take_pieces(),
            token_ids=output.token_ids[:num_used],
            logprobs=output.logprobs[:num_used],
            finish_reason=reason,
            end_ids=end_ids,
            prompt_ids=self.prompt.ids if is_first else (),
            stop=self._text.stopped,
        )

    def _push(self, tokens: tuple[int, ...]) -> tuple[str, int]:
        """Text of `tokens`, and how many of them were used when a stop string or a last call ends it."""
        pieces: list[str] = []
        for i, token in enumerate(tokens):
            self.num_tokens += 1
            pieces.append(self._read(self._text.push(token)))
            if self._text.stopped or self._parser.is_over:
                return "".join(pieces), i + 1
        return "".join(pieces), len(tokens)

    def _read(self, text: str) -> str:
        """Have the parser read the text of a token."""
        was_thought = self._parser.in_thought
        self._pieces += self._parser.push(text)
        self.num_reasoning_tokens += was_thought or self._parser.in_thought
        return text

    def _take_pieces(self) -> tuple[Piece, ...]:
        pieces, self._pieces = tuple(self._pieces), []
        return pieces

    def _last_text(self, stop_token: int | None) -> str:
        text = ""
        if stop_token is not None:
            self.num_tokens += 1
            if self._keeps_stop and stop_token in self.sampling.stop_token_ids:
                text = self._text.push(stop_token)
        text += self._text.flush()
        self._pieces += self._parser.push(text)
        return text

    def _end_reason(self, output: Output) -> EndReason:
        assert output.finish is not None, output
        if output.finish.reason in ("stop", "length"):
            return output.finish.reason
        raise EngineError(output.finish.message or "the engine gave up on this request")


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
    ) -> None:
        """`booking` is told what is used, and when it ends. Who still iterates after `timeout_s` from now is told
        DeadlineError. `started_s` is when the caller asked, on `time.perf_counter`'s clock."""
        self._engine = engine
        self._observer = observer
        self._started_s = started_s
        self._prompts = tuple(prompts)
        self._booking = booking
        self._news: deque[Delta | BaseException] = deque()
        self._num_unread_bytes = 0
        self._arrived = asyncio.Event()
        """Set while there is something to read: news, or the end."""
        self._num_choices = params.n
        self.choices = [Choice(i, prompts[i // params.n], params, tokenizer) for i in range(len(prompts) * params.n)]
        self._id = secrets.token_hex(8)
        self._closed = False
        self._unfinished = "abort"
        """Why choices have ended that were closed."""
        self._ended = asyncio.Event()
        self._tasks = {asyncio.create_task(self._run(choice)) for choice in self.choices}
        self._num_running = len(self._tasks)
        self._timer = None if timeout_s is None else asyncio.get_running_loop().call_later(timeout_s, self._time_is_up)
        for task in self._tasks:
            task.add_done_callback(self._task_done)

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the iterator has ended."""
        cached = {id(choice.prompt): 0 for choice in self.choices}
        for choice in self.choices:
            cached[id(choice.prompt)] = max(cached[id(choice.prompt)], choice.num_cached_tokens)
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
        await self._arrived.wait()
        if not self._news:
            raise StopAsyncIteration
        news = self._next()
        while (following := self._mergeable(news)) is not None:
            news = news.merge(following)  # a reader that is slower than the engine gets longer pieces
            self._next()
        if not self._news and not self._ended.is_set():
            self._arrived.clear()
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
            self._tell(error)
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _time_is_up(self) -> None:
        self._unfinished = "timeout"
        self.close(DeadlineError(OUT_OF_TIME))

    async def wait_ended(self) -> None:
        """Until the engine has spoken its last word and everything is given back."""
        await self._ended.wait()

    async def _run(self, choice: Choice) -> None:
        request = Request(
            id=f"{self._id}-{choice.index}",
            prompt_ids=choice.prompt.ids,
            params=choice.sampling,
            items=choice.prompt.items,
            priority=choice.priority,
            cache_salt=self._booking.tenant.salted(choice.cache_salt),
            tenant=self._booking.tenant.id,
            weight=self._booking.tenant.weight,
        )
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                if output.finish and output.finish.reason == "error" and not self._engine.alive():
                    raise EngineDeadError("the engine has stopped")
                if delta := choice.feed(output):
                    self._tell(delta)
                    self._observe(choice, delta)
                if choice.end_reason:  # at a stop string the engine is not done yet: leaving aborts the sequence
                    return
        raise EngineError("the engine ended this request without a reason")

    def _tell(self, news: Delta | BaseException) -> None:
        self._news.append(news)
        self._arrived.set()
        if isinstance(news, Delta):
            self._num_unread_bytes += news.num_bytes
            if self._num_unread_bytes > MAX_UNREAD_BYTES:
                self._forget_reader()

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

    def _task_done(self, task: asyncio.Task[None]) -> None:
        error = EngineError("the request was cancelled") if task.cancelled() else task.exception()
        if error is not None and not self._closed:
            self._tell(error)
        self._num_running -= 1
        if self._num_running == 0:
            self._ended.set()
            self._arrived.set()
            if self._timer is not None:
                self._timer.cancel()
            self._booking.end()
            self._observer.ended(self.report())

    def report(self) -> CallReport:
        """What came of the call, or has so far."""
        usage = self.usage
        has_failed = any(task.done() and not task.cancelled() and task.exception() for task in self._tasks)
        return CallReport(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_output_tokens=usage.num_output_tokens,
            sampling=self.choices[0].sampling,
            answers_per_prompt=self._num_choices,
            start_s=self._started_s,
            end_s=time.perf_counter(),
            spans=tuple(span for prompt in self._prompts for medium in prompt.media for span in medium.spans),
            answers=tuple(choice.report("error" if has_failed else self._unfinished) for choice in self.choices),
        )
