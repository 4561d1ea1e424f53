"""Text in, text out: everything between a conversation and the engine, for HTTP and for Python alike."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec

from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.errors import EngineDeadError, InvalidRequestError, OverloadedError
from dashinfer_vlm.frontend.bad_words import bad_word_ids
from dashinfer_vlm.frontend.constraints import constrained
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.observer import Observer, Silence
from dashinfer_vlm.frontend.params import DEFAULT_PARAMS, GenerationParams
from dashinfer_vlm.frontend.prompt import Prompt, PromptBuilder
from dashinfer_vlm.frontend.tokenizer import Tokenizer

_RESTART_S = 30
"""When to try again at a server that shuts down: about how long another one takes to load."""

PromptText = str | Sequence[int]


class Service:
    """One model's front end. Owns nothing but the requests in flight: engine and loader are closed by who made them."""

    def __init__(
        self,
        engine: EngineClient,
        prompts: PromptBuilder,
        *,
        sampling_defaults: dict[str, float | int] | None = None,
        max_queued_requests: int | None = 1024,
    ) -> None:
        """`sampling_defaults` are the checkpoint's, for callers that build their SamplingParams from a request.

        Beyond `max_queued_requests` that wait for the engine, requests are refused; None means no limit.
        """
        self.engine = engine
        self.prompts = prompts
        self.sampling_defaults = sampling_defaults or {}
        self.observer: Observer = Silence()
        self._max_in_flight = (
            math.inf if max_queued_requests is None else engine.info.max_num_seqs + max_queued_requests
        )
        self._num_in_flight = 0
        self._num_requests = 0
        self._draining = False
        self._closed = False
        self._generations: set[Generation] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompts.tokenizer

    @property
    def num_in_flight(self) -> int:
        """Choices between their admission and the engine's last word."""
        return self._num_in_flight

    @property
    def num_requests(self) -> int:
        """Calls between their admission and the engine's last word on the last of their choices."""
        return self._num_requests

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return self.engine.alive() and not self._draining

    async def chat(self, dialogue: Dialogue, params: GenerationParams) -> Generation:
        """Answer a conversation.

        Raises, before anything is generated, InvalidRequestError and its kin for what the caller did wrong,
        OverloadedError when too many wait, EngineDeadError without an engine.
        """
        with self._admitted(params, params.n) as leave:
            started_s = time.perf_counter()
            params = await self._prepared(params)
            prompt = await self.prompts.chat(dialogue, params)
            try:
                held = constrained(params, dialogue, prompt.form, self.tokenizer.marks)
                held.validate(self.engine.info.vocab_size)
            except InvalidRequestError:
                prompt.release()
                raise
            return self._start([prompt], held, leave, started_s)

    async def complete(self, prompts: Sequence[PromptText], params: GenerationParams) -> Generation:
        """Continue texts or ids; choice `i` belongs to prompt `i // n`. Raises like `chat`."""
        with self._admitted(params, params.n * len(prompts)) as leave:
            started_s = time.perf_counter()
            params = await self._prepared(params)
            built = [await self.prompts.text(prompt, params) for prompt in prompts]
            return self._start(built, params, leave, started_s)

    async def count(self, dialogue: Dialogue, params: GenerationParams = DEFAULT_PARAMS) -> list[int]:
        """The prompt's ids as `chat` would send them, media expanded; the media are loaded for it. Raises like it."""
        with self._admitted(params, 1) as leave:
            prompt = await self.prompts.chat(dialogue, params)
            prompt.release()
            leave()
            return prompt.ids

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; let those in flight end for `timeout_s`, then abort them and wait for that."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            self._closed = True
            for generation in tuple(self._generations):
                generation.close(_shutting_down())
            await asyncio.gather(*(generation.wait_ended() for generation in tuple(self._generations)))
        self._closed = True

    async def _prepared(self, params: GenerationParams) -> GenerationParams:
        """With words as ids; raises InvalidRequestError for too many."""
        if not params.bad_words:
            return params
        ids = await asyncio.to_thread(bad_word_ids, params.bad_words, self.tokenizer)
        sampling = msgspec.structs.replace(params.sampling, bad_words=params.sampling.bad_words + ids)
        sampling.validate(self.engine.info.vocab_size, params.max_tokens_name)
        return replace(params, sampling=sampling)

    @contextmanager
    def _admitted(self, params: GenerationParams, num_choices: int) -> Iterator[Callable[[], None]]:
        """Hold `num_choices` places; whoever leaves the block without an error calls the yielded function later."""
        self._check_open()
        params.validate(self.engine.info.vocab_size)
        if num_choices > self._max_in_flight:
            raise InvalidRequestError(
                f"the request asks for {num_choices} answers; the limit for all requests together is "
                f"{self._max_in_flight}; "
                "ask for fewer at a time or start with --max-queued-requests",
                param="n",
            )
        if self._num_in_flight + num_choices > self._max_in_flight:
            raise OverloadedError(
                f"{self._num_in_flight} requests are in flight, the limit is {self._max_in_flight}; try again later"
            )
        self._num_in_flight += num_choices
        self._num_requests += 1
        self._idle.clear()

        def leave() -> None:
            self._num_in_flight -= num_choices
            self._num_requests -= 1
            if not self._num_in_flight:
                self._idle.set()

        try:
            yield leave
        except BaseException:
            leave()
            raise

    def _check_open(self) -> None:
        if not self.engine.alive():
            raise EngineDeadError("the engine has stopped")
        if self._draining:
            raise _shutting_down()

    def _start(
        self, prompts: list[Prompt], params: GenerationParams, leave: Callable[[], None], started_s: float
    ) -> Generation:
        def end() -> None:
            for prompt in prompts:
                prompt.release()
            self._generations.discard(generation)
            leave()

        if self._closed:  # the media took longer than the drain
            for prompt in prompts:
                prompt.release()
            raise _shutting_down()
        generation = Generation(self.engine, self.tokenizer, prompts, params, end, self.observer, started_s)
        self._generations.add(generation)
        return generation


def _shutting_down() -> OverloadedError:
    return OverloadedError("the server is shutting down", retry_after_s=_RESTART_S)
