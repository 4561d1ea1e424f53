"""The engine: requests in, tokens out, one step at a time. It knows no text and no transport."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import msgspec
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.placement import make_stage
from dashinfer_vlm.encoders.shared.stage import with_shared_cache
from dashinfer_vlm.engine.admission import Limits, check_request
from dashinfer_vlm.engine.blocks import BlockPool
from dashinfer_vlm.engine.cards.calls import Followers
from dashinfer_vlm.engine.devices import first_cost, make_runner, max_batched_tokens
from dashinfer_vlm.engine.drafts import make_drafter
from dashinfer_vlm.engine.grammars.compiler import Compiler
from dashinfer_vlm.engine.memory import max_item_patches, max_pinned_tokens, most_running
from dashinfer_vlm.engine.sampler import NO_TOKEN_LEFT, PROBLEMS, Sampled
from dashinfer_vlm.engine.scheduler import Scheduler
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.share import SHARES
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.engine.steps import Chunk, Flight, Plan, StepRunner
from dashinfer_vlm.engine.times import StepTimes
from dashinfer_vlm.errors import EngineDeadError, InvalidRequestError, UnsupportedError
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER
from dashinfer_vlm.models.base import KVCache, Model
from dashinfer_vlm.request import Finish, Grammar, Output, Request, TokenLogprob

log = logging.getLogger(__name__)

_NO_NUMBERS = Finish("error", message=PROBLEMS[NOT_A_NUMBER])
_LAST_BREATH_S = 1.0
"""For which a rank may live on whose end has failed a step of the first one."""
_NO_MEMORY = Finish("error", message="the device has no memory left for this request; try again, or send a smaller one")


class Engine:
    """Runs many sequences over one model. Not thread-safe: one loop owns it (see loop.py)."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        config: EngineConfig,
        grammars: Compiler | None = None,
        followers: Followers | None = None,
    ) -> None:
        """Without `grammars`, which are the engine's own from now on, requests that need them are refused. So are
        `followers`, the other ranks of a model that is shared."""
        self._followers = followers
        self.model = model
        self.grammars = grammars
        self.config = config
        self.stage = with_shared_cache(make_stage(model, config), model, config)
        self.runner: StepRunner = make_runner(model, kv, self.stage.cache, config, followers)
        kv = self.runner.kv
        self.limits = Limits.of(model, kv, config, max_item_patches=max_item_patches(model, kv))
        self.scheduler = Scheduler(
            pool=BlockPool(kv.num_blocks, prefix_cache=config.prefix_cache),
            block_size=kv.block_size,
            stage=self.stage,
            cost=first_cost(model, config),
            max_num_seqs=most_running(kv, config),
            max_num_batched_tokens=max_batched_tokens(config, model.device),
            share=SHARES[config.schedule],
            max_pinned_tokens=max_pinned_tokens(model, config),
            num_seats=kv.num_seats or 0,
        )
        self._speculation = config.speculation
        self._sequences: dict[str, Sequence] = {}
        self._flights: deque[Flight] = deque()  # steps under way, the oldest first
        self._news: list[Output] = []  # what no step has delivered yet
        self._seeds = itertools.count(config.seed)
        self._counted = EngineStats()  # what only grows
        self._times = StepTimes()

    def prepare(self, request: Request) -> Future[Any] | None:
        """Begin what takes time before `add`, elsewhere: once the future is done, `add` does not wait with it. None:
        nothing.

        Raises like `add`.
        """
        grammar = request.params.grammar
        if grammar is None:
            return None
        check_request(request, self.limits)
        return self._compiler(grammar).prepare(grammar)

    def add(self, request: Request, prepared: Future[Any] | None = None) -> None:
        """Accept a request, which then ends in exactly one final Output; or raise and know nothing of it. `prepared` is
        what `prepare` gave for it.

        Raises InvalidRequestError or ContextLengthError with a message fit for the client.
        """
        if request.id in self._sequences:
            raise InvalidRequestError(f"a request with id {request.id!r} is already running", param="id")
        max_tokens = check_request(request, self.limits)
        if request.positions is None:
            positions, offset = self.model.positions(len(request.prompt_ids), request.items)
        else:
            positions = request.positions.reshape(3, -1).to(torch.int64)
            offset = int(positions.max()) + 1 - len(request.prompt_ids)
        seed = next(self._seeds) if request.params.seed is None else request.params.seed
        grammar = request.params.grammar
        sequence = Sequence(
            request,
            positions=positions,
            offset=offset,
            max_tokens=max_tokens,
            seed=seed,
            drafter=make_drafter(self._speculation, self.limits.vocab_size),
            matcher=None if grammar is None else self._compiler(grammar).matcher(grammar, prepared),
        )
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)
        self._counted.num_prompt_tokens_total += len(request.prompt_ids)

    def abort(self, request_id: str) -> None:
        """End a sequence; its final Output comes with the next step. An id that has already ended is not an error."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, Finish("abort"))

    def has_work(self) -> bool:
        return bool(self._sequences or self._flights or self._news or self.stage.has_work())

    def step(self) -> list[Output]:
        """Start a step for every sequence that the budget reaches; what there is to tell of the steps that are done."""
        self._times.begin()
        if self._needs_tokens():
            self._settle(leave=0)
        plan = self.scheduler.schedule()
        if plan.chunks:
            self._start(plan)
        self._settle(leave=self.runner.depth if plan.chunks else 0)
        if self._flights:
            self._resume(self._flights[-1])
        self._encode(plan)
        news = self._take_news()
        self._times.end(goes_on=self.has_work())
        return news

    def fail_all(self, message: str) -> list[Output]:
        """End every sequence with an error, after a failure that cannot be pinned on one of them."""
        for sequence in list(self._sequences.values()):
            self._end(sequence, Finish("error", message=message))
        self._flights.clear()
        return self._take_news()

    def close(self) -> None:
        """Give back what runs outside this process; the engine is not used any more. Idempotent."""
        self.stage.close()
        if self._followers is not None:
            self._followers.close()
        if self.grammars is not None:
            self.grammars.close()

    def stats(self) -> EngineStats:
        """Raises EngineDeadError when a rank of the model has ended."""
        if self._followers is not None:
            self._followers.check()
        pool, times = self.scheduler.pool, self._times
        return msgspec.structs.replace(
            self._counted,
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_preemptions_total=self.scheduler.num_preemptions,
            busy_seconds_total=times.busy_s,
            prefill_seconds_total=times.prefill_s,
            sampling_seconds_total=times.sampling_s,
            decode_seconds_total=dict(times.decode_s),
            decode_steps_total=dict(times.decode_steps),
            **msgspec.structs.asdict(self.stage.stats),
        )

    def _compiler(self, grammar: Grammar) -> Compiler:
        if self.grammars is None:
            raise UnsupportedError("this engine has no tokenizer for structured output", param=grammar.param)
        return self.grammars

    def _needs_tokens(self) -> bool:
        """Whether the next step can be planned and started only when the tokens that are owed are here."""
        owed = (sequence for sequence in self.scheduler.running if sequence.num_owed)
        return bool(self._flights) and (
            self.scheduler.needs_tokens() or any(self.runner.needs_tokens(sequence) for sequence in owed)
        )

    def _start(self, plan: Plan) -> None:
        """A step that finds no memory costs the request that asks for most of it, the newest of equal ones. Nothing has
        happened to the others, which are planned again, but to their states. Other ranks cannot be brought back from
        within a step."""
        try:
            flight = self.runner.start(plan)
        except EngineDeadError:
            raise
        except Exception as error:
            if self._followers is not None:
                self._followers.check(patience_s=_LAST_BREATH_S)
                why = type(error).__name__
                raise EngineDeadError(f"the first rank failed ({why}) at what the others have begun") from error
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            log.error("no memory for a step of %d rows: %s", plan.num_tokens, error)
            largest = max(reversed(plan.chunks), key=lambda chunk: chunk.num_rows)
            self._end(largest.sequence, _NO_MEMORY)
            if self.model.text.state_bytes:
                self._settle(leave=0)
                self.scheduler.begin_again(plan)
        else:
            self._flights.append(flight)
            self.scheduler.started(plan)

    def _resume(self, flight: Flight) -> None:
        """A choice of tokens that finds no memory costs those who wait for what the step was to tell: it is lost."""
        try:
            flight.resume()
        except torch.OutOfMemoryError as error:
            log.error("no memory for a step's choice of tokens: %s", error)
            self._flights.remove(flight)
            for chunk in (*flight.plan.sampled_chunks, *flight.plan.scored_chunks, *flight.plan.vector_chunks):
                if chunk.sequence.finish is None:
                    self._end(chunk.sequence, _NO_MEMORY)

    def _settle(self, *, leave: int) -> None:
        """Take what the oldest steps bring, until `leave` of them are under way."""
        while len(self._flights) > leave:
            flight = self._flights.popleft()
            sampled = flight.sampled()
            self._tell_scores(flight.plan, flight.scores())
            self._update(flight.plan, sampled)
            self._tell_vectors(flight.plan, flight.vectors())
            self._count(flight.plan, flight.seconds(), flight.sampling_seconds())

    def _update(self, plan: Plan, sampled: list[list[Sampled]]) -> None:
        """What came for sequences that have ended meanwhile is nobody's."""
        for chunk, rows in zip(plan.sampled_chunks, sampled, strict=True):
            if chunk.sequence.finish is None:
                self._news.append(self._advance(chunk, rows))

    def _tell_scores(self, plan: Plan, scores: list[list[TokenLogprob]]) -> None:
        for chunk, logprobs in zip(plan.scored_chunks, scores, strict=True):
            if chunk.sequence.finish is None:
                self._news.append(Output(chunk.sequence.id, prompt_logprobs=tuple(logprobs)))

    def _tell_vectors(self, plan: Plan, vectors: list[bytes]) -> None:
        """They end their sequences."""
        for chunk, vector in zip(plan.vector_chunks, vectors, strict=True):
            if chunk.sequence.finish is None:
                self._count_prompt(chunk.sequence)
                last = self._output(chunk.sequence, finish=Finish("stop") if vector else _NO_NUMBERS)
                self._news.append(msgspec.structs.replace(last, vector=vector))

    def _count_prompt(self, sequence: Sequence) -> None:
        self._counted.num_cached_tokens_total += sequence.num_cached
        sequence.has_read_prompt()

    def _advance(self, chunk: Chunk, rows: list[Sampled]) -> Output:
        """Give the sequence its next token, and one more for each guess that came true in front of it."""
        sequence, num_before = chunk.sequence, chunk.sequence.num_known
        if not sequence.num_known_output:
            self._count_prompt(sequence)
        logprobs = []
        for sampled, guess in zip(rows, (*chunk.draft, None), strict=True):
            finish = self._accept(sequence, sampled)
            logprobs.append(sampled.logprob)
            if finish is not None or sampled.token != guess:
                break
            self.scheduler.computed(sequence, 1)
            self._counted.num_accepted_draft_tokens_total += 1
        if sampled.guess and sequence.drafter is not None:
            sequence.drafter.hear(sampled.guess)
        tokens = sequence.tokens[num_before : sequence.num_known]
        if finish is None:
            self.scheduler.publish(sequence)
            if len(tokens) <= len(chunk.draft):
                self.scheduler.states.fall_behind(sequence, chunk.start)
        self._counted.num_draft_tokens_total += len(chunk.draft)
        self._counted.num_output_tokens_total += len(tokens)
        return self._output(sequence, tokens, logprobs[: len(tokens)], finish)

    def _accept(self, sequence: Sequence, sampled: Sampled) -> Finish | None:
        """Append the token, or end the sequence by it, or both."""
        params = sequence.request.params
        if sampled.problem is not None:
            return Finish("error", message=sampled.problem, impossible=sampled.problem == NO_TOKEN_LEFT)
        if sequence.matcher is not None and (problem := sequence.matcher.problem):
            return Finish("error", message=problem)
        is_end = sampled.token in self.model.eos_token_ids and not params.ignore_eos
        if (is_end or sampled.token in sequence.stop_token_ids) and sequence.num_known_output >= params.min_tokens:
            return Finish("stop", stop_token=sampled.token)
        sequence.append(sampled.token)
        num_output = sequence.num_known_output
        is_complete = sequence.matcher is not None and sequence.matcher.is_complete
        if is_complete or (num_output >= params.min_tokens and sequence.ends_with_a_stop_sequence):
            return Finish("stop")
        return Finish("length") if num_output >= sequence.max_tokens else None

    def _count(self, plan: Plan, seconds: float, sampling_s: float) -> None:
        self._times.add(plan, seconds, sampling_s, self.scheduler.cost)
        self.scheduler.cost.observe(plan.num_decode_rows, plan.num_tokens - plan.num_decode_rows, seconds)
        self._counted.step_seconds_total += seconds
        self._counted.num_steps_total += 1
        self._counted.num_computed_tokens_total += plan.num_tokens

    def _output(
        self,
        sequence: Sequence,
        tokens: Iterable[int] = (),
        logprobs: Iterable[TokenLogprob | None] = (),
        finish: Finish | None = None,
    ) -> Output:
        if finish is not None:
            self._forget(sequence, finish)
        return Output(
            sequence.id,
            token_ids=tuple(tokens),
            logprobs=tuple(logprob for logprob in logprobs if logprob is not None),
            finish=finish,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached,
            spans=sequence.take_spans(),
        )

    def _encode(self, plan: Plan) -> None:
        if plan.encoder_s is None:
            return
        with torch.inference_mode():
            self.stage.advance(plan.encoder_s)
        failures = self.stage.take_failures()
        for sequence in list(self._sequences.values()) if failures else []:
            reasons = [failures[i.content_hash] for i in sequence.pending_items if i.content_hash in failures]
            if reasons:
                self._end(sequence, Finish("error", message=reasons[0]))

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        self._news.append(self._output(sequence, finish=finish))

    def _forget(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        self.scheduler.remove(sequence)
        self.runner.forget(sequence)
        del self._sequences[sequence.id]

    def _take_news(self) -> list[Output]:
        news, self._news = self._news, []
        return news
