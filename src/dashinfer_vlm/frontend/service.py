"""Text in, text out: everything between a conversation and the engine, for HTTP and for Python alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import anyio
import msgspec

from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.errors import DeadlineError, EngineDeadError, InvalidRequestError, OverloadedError, UnavailableError
from dashinfer_vlm.frontend.backlog import ANY_LOAD, NO_LIMITS, Backlog, QueueLimits
from dashinfer_vlm.frontend.bad_words import bad_word_ids
from dashinfer_vlm.frontend.booking import Booking
from dashinfer_vlm.frontend.constraints import constrained
from dashinfer_vlm.frontend.generation import OUT_OF_TIME, Generation
from dashinfer_vlm.frontend.messages import Dialogue
from dashinfer_vlm.frontend.observer import Observer, Silence, current_calls
from dashinfer_vlm.frontend.params import DEFAULT_PARAMS, GenerationParams, check_timeout
from dashinfer_vlm.frontend.prompt import Prompt, PromptBuilder
from dashinfer_vlm.frontend.scores import Pair
from dashinfer_vlm.frontend.tenants import Tenant, current_tenant, current_timeout_s
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.request import SamplingParams

_RESTART_S = 30
"""When to try again at a server that shuts down, or whose engine does: about how long another one takes to load."""
_NO_TOKENS = SamplingParams(max_tokens=1)
"""Of a call for vectors or scores, whose prompts leave as much room as those of others."""

PromptText = str | Sequence[int]


class Service:
    """One model's front end. Owns nothing but the requests in flight: engine and loader are closed by who made them."""

    def __init__(
        self,
        engine: EngineClient,
        prompts: PromptBuilder,
        *,
        sampling_defaults: dict[str, float | int] | None = None,
        queue: QueueLimits = NO_LIMITS,
    ) -> None:
        """`sampling_defaults` are the checkpoint's, for callers that build their SamplingParams from a request.

        Beyond what `queue` lets wait for the engine, requests are refused.
        """
        self.engine = engine
        self.prompts = prompts
        self.sampling_defaults = sampling_defaults or {}
        self.observer: Observer = Silence()
        self.backlog = Backlog(queue)
        self._max_in_flight = engine.info.max_num_seqs + queue.requests
        self._num_in_flight = 0
        self._num_requests = 0
        self.draining = asyncio.Event()
        """Set once no more requests are taken, since the server ends."""
        self._closed = False
        self._generations: set[Generation] = set()
        self._preparing: set[anyio.CancelScope] = set()
        """Of calls whose prompts are not ready, since their media are under way."""
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
        return self.engine.alive() and not self.draining.is_set()

    async def chat(self, dialogue: Dialogue, params: GenerationParams) -> Generation:
        """Answer a conversation.

        Raises, before anything is generated, InvalidRequestError and its kin for what the caller did wrong,
        OverloadedError when too many wait or while the engine is replaced, EngineDeadError without one, DeadlineError.
        """
        with self._admitted(params, params.n) as admission:
            params = await self._prepared(params)
            prompt = await self.prompts.chat(dialogue, params, media_salt=current_tenant.get().salt)
            try:
                room = self.engine.info.max_model_len - len(prompt.ids)
                held, form = constrained(params.within(room), dialogue, prompt.form, self.tokenizer.marks)
                held.validate(self.engine.info.vocab_size)
            except BaseException:  # nobody else holds its media yet
                prompt.release()
                raise
            return self._start([replace(prompt, form=form)], held, admission)

    async def complete(self, prompts: Sequence[PromptText], params: GenerationParams) -> Generation:
        """Continue texts or ids; choice `i` belongs to prompt `i // n`. Raises like `chat`."""
        with self._admitted(params, params.n * len(prompts)) as admission:
            params = await self._prepared(params)
            built = [await self.prompts.text(prompt, params) for prompt in prompts]
            return self._start(built, params, admission)

    async def embed(
        self, inputs: Dialogue | Sequence[PromptText], params: GenerationParams, *, ending: bool = True
    ) -> Generation:
        """A vector of a conversation, or of each text or each list of ids, which are taken as they are: `Choice.vector`
        once the iterator has ended. Of `params` nothing counts that is about tokens. Without `ending`, nothing is put
        behind what the inputs say.

        More inputs than the engine runs at once wait for each other in its line, not for places. Raises like `chat`,
        and UnsupportedError for a model that was not published for it.
        """
        form = self.prompts.vectors
        form.check()
        params = replace(params, sampling=_NO_TOKENS)
        num_inputs = 1 if isinstance(inputs, Dialogue) else len(inputs)
        with self._admitted(params, min(num_inputs, self.engine.info.max_num_seqs)) as admission:
            behind = form.ending if ending else ()
            if isinstance(inputs, Dialogue):
                salt = current_tenant.get().salt
                built = [await self.prompts.chat(form.instructed(inputs), params, media_salt=salt, ending=behind)]
            else:
                built = await self.prompts.for_vectors(inputs, params, behind)
            return self._start(built, params, admission, wants_vectors=True)

    async def score(
        self, pairs: Sequence[Pair], params: GenerationParams, *, instruction: str | None = None
    ) -> Generation:
        """`Choice.vector` of each pair is what `score_of` takes. Otherwise as `embed`."""
        self.prompts.scores.check()
        params = replace(params, sampling=_NO_TOKENS)
        with self._admitted(params, min(len(pairs), self.engine.info.max_num_seqs)) as admission:
            built = await self.prompts.for_scores(pairs, params, instruction, media_salt=current_tenant.get().salt)
            return self._start(built, params, admission, wants_vectors=True)

    async def count(self, dialogue: Dialogue, params: GenerationParams = DEFAULT_PARAMS) -> list[int]:
        """The prompt's ids as `chat` would send them, media expanded; the media are loaded for it. Raises like it."""
        with self._admitted(params, 1) as admission:
            prompt = await self.prompts.chat(dialogue, params, media_salt=current_tenant.get().salt)
            prompt.release()
            admission.leave()
            return prompt.ids

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; let those in flight end for `timeout_s`, then abort them and wait for that.

        Those that still wait for their media are told so, too.
        """
        self.draining.set()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            self._closed = True
            for scope in tuple(self._preparing):
                scope.cancel()
            for generation in tuple(self._generations):
                generation.close(shutting_down())
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
    def _admitted(self, params: GenerationParams, num_choices: int) -> Iterator[_Admission]:
        """Hold `num_choices` places; whoever leaves the block without an error calls `leave` of what is yielded later.

        The block has the time that the request gives for its answer; DeadlineError is raised when it is over.
        """
        self._check_open()
        params.validate(self.engine.info.vocab_size)
        timeout_s, tenant = _timeout_s(params), current_tenant.get()
        self._check_places(num_choices, tenant)
        self._num_in_flight += num_choices
        tenant.num_choices += num_choices
        self._num_requests += 1
        self._idle.clear()

        def leave() -> None:
            self._num_in_flight -= num_choices
            tenant.num_choices -= num_choices
            self._num_requests -= 1
            if not self._num_in_flight:
                self._idle.set()

        admission = _Admission(leave, time.perf_counter(), timeout_s)
        try:
            with self._in_time(admission.left_s):
                yield admission
        except BaseException:
            leave()
            raise

    @contextmanager
    def _in_time(self, left_s: float | None) -> Iterator[None]:
        """Raise DeadlineError in place of what the block does when the time is over, UnavailableError when the server
        ends."""
        with anyio.move_on_after(left_s) as scope:
            self._preparing.add(scope)
            try:
                yield
            finally:
                self._preparing.discard(scope)
        if scope.cancelled_caught:
            raise shutting_down() if self._closed else DeadlineError(OUT_OF_TIME)

    def _check_places(self, num_choices: int, tenant: Tenant) -> None:
        if num_choices > self._max_in_flight:
            raise InvalidRequestError(
                f"the request asks for {num_choices} answers; the limit for all requests together is "
                f"{self._max_in_flight}; "
                "ask for fewer at a time or start with --max-queued-requests",
                param="n",
            )
        if self._num_in_flight + num_choices > self._max_in_flight:
            raise OverloadedError(
                f"{self._num_in_flight} requests are in flight, the limit is {self._max_in_flight}; try again later",
                reason="queued_requests",
                retry_after_s=self.backlog.seconds_for_a_place(),
            )
        if tenant.has_neighbours and tenant.num_choices + num_choices > self._max_in_flight - self._num_in_flight:
            raise OverloadedError(
                f"{tenant.num_choices} requests with this key are in flight, and no key may hold more places than are "
                "left for others; try again later",
                reason="key_share",
                retry_after_s=self.backlog.seconds_for_a_place(),
            )
        self.backlog.check(ANY_LOAD)

    def _check_open(self) -> None:
        if self.engine.gone():
            raise EngineDeadError("the engine has stopped")
        if not self.engine.alive():
            raise UnavailableError(
                "the engine has died and is being started again; try again later",
                reason="engine_restart",
                retry_after_s=_RESTART_S,
            )
        if self.draining.is_set():
            raise shutting_down()

    def _start(
        self, prompts: Sequence[Prompt], params: GenerationParams, admission: _Admission, *, wants_vectors: bool = False
    ) -> Generation:
        def end() -> None:
            self._generations.discard(generation)
            admission.leave()

        try:
            if self._closed:  # the media took longer than the drain
                raise shutting_down()
            booking = Booking(prompts, current_tenant.get(), self.backlog, end)
        except BaseException:
            for prompt in prompts:
                prompt.release()
            raise
        generation = Generation(
            self.engine,
            self.tokenizer,
            prompts,
            params,
            booking,
            self.observer,
            admission.started_s,
            admission.left_s,
            wants_vectors=wants_vectors,
        )
        self._generations.add(generation)
        if (calls := current_calls.get()) is not None:
            calls.append(generation.report)
        return generation


@dataclass(frozen=True, slots=True)
class _Admission:
    """One call that was let in."""

    leave: Callable[[], None]
    """Gives its places back."""
    started_s: float
    """On `time.perf_counter`'s clock."""
    timeout_s: float | None

    @property
    def left_s(self) -> float | None:
        """Seconds that are left for the answer."""
        return None if self.timeout_s is None else self.started_s + self.timeout_s - time.perf_counter()


def _timeout_s(params: GenerationParams) -> float | None:
    """Of the request's field and its header, the shorter one; raises InvalidRequestError."""
    header_s = current_timeout_s.get()
    if header_s is not None:
        check_timeout(header_s, "x-request-timeout")
    return min((seconds for seconds in (params.timeout_s, header_s) if seconds is not None), default=None)


def shutting_down() -> UnavailableError:
    """What is told to whoever asks a server that ends, or is not answered before it does."""
    return UnavailableError("the server is shutting down", reason="shutting_down", retry_after_s=_RESTART_S)
