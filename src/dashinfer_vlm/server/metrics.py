"""`GET /metrics`: what Prometheus scrapes. Each application has a registry of its own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import msgspec
from fastapi import APIRouter
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.frontend.observer import CallReport
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.frontend.tenants import Tenant
from dashinfer_vlm.media.types import MediaCounters
from dashinfer_vlm.server.described import Operation
from dashinfer_vlm.server.token_metrics import TokenMetrics
from dashinfer_vlm.server.vllm_metrics import VllmMetrics
from dashinfer_vlm.stages import STAGES

_PREFIX = "dashinfer_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_STAGE_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, *_SECONDS)
_PATIENCE_S = 5.0
"""Less than Prometheus waits for an answer, more than a step takes."""
_ABORTED = "aborted"
"""Stands for the status of an answer that was not sent to its end."""
_MEDIA_GAUGES = frozenset({"cache_bytes"})

HELP = {
    "engine_num_waiting": "Sequences that wait for a place.",
    "engine_num_running": "Sequences that are prefilled or decode.",
    "engine_num_blocks": "Blocks of the KV cache.",
    "engine_num_free_blocks": "Blocks of the KV cache that no sequence holds, cached prefixes among them.",
    "engine_num_steps_total": "Steps of the engine.",
    "engine_num_prompt_tokens_total": "Prompt tokens of accepted sequences.",
    "engine_num_cached_tokens_total": "Prompt tokens that were found in the prefix cache.",
    "engine_num_computed_tokens_total": "Rows that the text model has computed.",
    "engine_num_output_tokens_total": "Tokens that were generated.",
    "engine_num_draft_tokens_total": "Tokens that were guessed and computed by speculative decoding.",
    "engine_num_accepted_draft_tokens_total": "Guessed tokens that were right.",
    "engine_num_preemptions_total": "Sequences that had to give their blocks back and begin anew.",
    "engine_num_items_encoded_total": "Pictures and videos that were encoded.",
    "engine_num_items_encoded_elsewhere_total": "Pictures and videos that vision workers encoded.",
    "engine_num_patches_encoded_total": "Patches that were encoded.",
    "engine_num_encoder_failures_total": "Pictures and videos that could not be encoded.",
    "engine_num_encoder_retries_total": "Pictures and videos that were encoded again after a failure.",
    "engine_num_encoder_restarts_total": "Vision workers that were started in place of another one.",
    "engine_num_encoders": "Vision workers that are ready.",
    "engine_embedding_hits_total": "Pictures and videos whose embedding was in memory.",
    "engine_embedding_misses_total": "Pictures and videos whose embedding was not in memory.",
    "engine_embedding_bytes": "Bytes of embeddings in memory.",
    "engine_shared_cache_hits_total": "Embeddings that were found in Redis.",
    "engine_shared_cache_misses_total": "Embeddings that were not in Redis.",
    "engine_shared_cache_read_bytes_total": "Bytes of embeddings read from Redis.",
    "engine_shared_cache_written_bytes_total": "Bytes of embeddings written to Redis.",
    "engine_shared_cache_errors_total": "Commands to Redis that failed, and values from it that could not be used.",
    "engine_shared_cache_dropped_total": "Embeddings that were not written since Redis was away or slow.",
    "engine_num_restarts_total": "Engine processes that were started in place of a dead one.",
    "engine_step_seconds_total": "Seconds that steps took, the vision encoder's part not among them.",
    "engine_busy_seconds_total": "Seconds in which the engine had something to do, between steps too.",
    "engine_prefill_seconds_total": "Seconds of steps that prompts took.",
    "engine_sampling_seconds_total": "Seconds of steps that the choice of tokens took, where it is timed apart.",
    "engine_decode_seconds_total": "Seconds of steps that streams took, by the number of streams in the step.",
    "engine_decode_steps_total": "Steps with streams, by their number: above 8 up to the next power of two.",
    "engine_encoder_seconds_total": "Seconds that the vision encoder took.",
    "media_fetches": "GETs of http and https URLs, redirects not counted.",
    "media_fetched_bytes": "Bytes that were fetched.",
    "media_decodes": "Media that were decoded.",
    "media_cache_hits": "Media that were found decoded in memory.",
    "media_cache_misses": "Media that were not in memory.",
    "media_cache_bytes": "Bytes of decoded media in memory.",
    "media_refusals": "Media that the policy or a limit refused.",
    "media_failures": "Media that could not be used, refused ones among them.",
    "media_worker_restarts": "Decoding processes that were started in place of another one.",
}
"""One text for each field of the engine's and the media room's counters."""


class Metrics:
    """An Observer that counts for Prometheus; engine and media are asked when somebody scrapes."""

    def __init__(self, service: Service, *, model_name: str | None = None, patience_s: float = _PATIENCE_S) -> None:
        """`model_name` is the label of vLLM's metrics, the engine's name for it when None. An engine that says nothing
        for `patience_s` counts as down."""
        self._service = service
        self._patience_s = patience_s
        self.registry = registry = CollectorRegistry()
        self._state = _State()
        registry.register(self._state)
        self._add_gauges(service)
        counter, histogram = partial(_counter, registry), partial(_histogram, registry)
        self.replies = counter(
            "http_replies",
            "HTTP answers by route and status; aborted are those that were not sent to their end.",
            "route",
            "status",
        )
        self._choices = counter(
            "choices", "Answers that are over (a request may ask for several), by how they ended.", "reason"
        )
        self._refusals = counter(
            "refusals", "Requests that were not taken, by the limit or the rule that kept them out.", "reason"
        )
        self._prompt = counter("prompt_tokens", "Tokens of the prompts of requests that are over.")
        self._cached = counter("cached_tokens", "Those of dashinfer_prompt_tokens that were found in the prefix cache.")
        self._tokens = TokenMetrics(_PREFIX, _SECONDS)
        registry.register(self._tokens)
        self._first = histogram(
            "time_to_first_token_seconds",
            "Seconds from the arrival of a request to the first token of each of its answers.",
        )
        self._whole = histogram(
            "request_seconds", "Seconds from the arrival of a request to the last token of its answers."
        )
        words = "Seconds that an item or an answer has spent in a stage."
        stages = Histogram(f"{_PREFIX}stage_seconds", words, ["stage"], buckets=_STAGE_SECONDS, registry=registry)
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        info = service.engine.info
        name = model_name or info.model
        facts = {fact: getattr(info, fact) for fact in ("device", "dtype", "quant_type", "vision_quant_type")}
        Info(f"{_PREFIX}engine", "What the engine runs.", registry=registry).info({"model": name, **facts})
        self._vllm = VllmMetrics(registry, name, info, self._tokens)
        ProcessCollector(registry=registry)

    def _add_gauges(self, service: Service) -> None:
        """What is looked up when somebody asks."""
        backlog = service.backlog
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("requests_in_flight", "Requests that are being prepared or answered.", lambda: service.num_requests),
            ("queued_requests", "Requests that have no token yet.", lambda: backlog.requests.waiting),
            ("queued_tokens", "Tokens of their prompts.", lambda: backlog.tokens.waiting),
            (
                "queued_visual_tokens",
                "Those that stand for pictures and videos.",
                lambda: backlog.visual_tokens.waiting,
            ),
            (
                "queued_encoder_seconds",
                "Time that the vision encoder is expected to need.",
                lambda: backlog.encoder_s,
            ),
        )
        for name, words, read in gauges:
            Gauge(_PREFIX + name, words, registry=self.registry).set_function(read)

    def tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None:
        self._tokens.sent(num_tokens)
        if first:
            self._first.observe(seconds)
            self._vllm.first_token(seconds)
        else:
            self._tokens.waited(num_tokens, seconds)

    def ended(self, report: CallReport) -> None:
        self._prompt.inc(report.num_prompt_tokens)
        self._cached.inc(report.num_cached_tokens)
        self._whole.observe(report.seconds)
        for answer in report.answers:
            self._choices.labels(answer.reason).inc()
        for span in (*report.spans, *(span for answer in report.answers for span in answer.spans)):
            self._stages[span.stage].observe(span.seconds)
        self._vllm.ended(report)

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def watch(self, tenants: Callable[[], Iterable[Tenant]]) -> None:
        """Tell what the holders of keys do, too."""
        self.registry.register(_Tenants(tenants))

    async def render(self) -> bytes:
        """The text format; without an engine that answers, its figures are absent and `dashinfer_engine_up` is 0."""
        try:
            stats = await asyncio.wait_for(self._service.engine.stats(), self._patience_s)
        except (EngineDeadError, asyncio.TimeoutError):
            stats = None
        media = self._service.prompts.loader.counters
        self._state.update(stats, media)
        self._vllm.update(stats, media)
        return generate_latest(self.registry)


class ReplyCounter:
    """ASGI middleware that counts answers; paths that are not routes share one label, so that nobody can invent
    more."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started: list[str] = []
        """The status of an answer that has begun and is not complete."""

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(str(message["status"]))
            elif not message.get("more_body") and started:
                self._count(scope, started.pop())
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            if started:
                self._count(scope, _ABORTED)

    def _count(self, scope: Scope, status: str) -> None:
        route = getattr(scope.get("route"), "path", scope["path"])
        self._metrics.replies.labels(route if route in self._paths else "other", status).inc()


METRICS = Operation(summary="Figures for Prometheus.", reply="text/plain")


def metrics_routes(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", openapi_extra=METRICS.extra)
    async def scrape() -> Response:
        return Response(await metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


class _State:
    """Collector of the engine's and the media room's own numbers: one metric per field, named after it."""

    def __init__(self) -> None:
        self._engine: EngineStats | None = None
        self._media = MediaCounters()

    def update(self, engine: EngineStats | None, media: MediaCounters) -> None:
        self._engine, self._media = engine, media

    def collect(self) -> Iterator[Metric]:
        up = 0 if self._engine is None else 1
        yield GaugeMetricFamily(f"{_PREFIX}engine_up", "Whether the engine answers.", value=up)
        if self._engine is not None:
            for name, value in msgspec.structs.asdict(self._engine).items():
                yield _metric(f"{_PREFIX}engine_{name}", value, counts=name.endswith("_total"))
        for name, value in dataclasses.asdict(self._media).items():
            yield _metric(f"{_PREFIX}media_{name}", value, counts=name not in _MEDIA_GAUGES)


class _Tenants:
    """Collector of what each name of a key has asked for."""

    def __init__(self, tenants: Callable[[], Iterable[Tenant]]) -> None:
        self._tenants = tenants

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(f"{_PREFIX}key_requests", "Requests that were taken, by key.", labels=["key"])
        refusals = CounterMetricFamily(f"{_PREFIX}key_refusals", "Requests over a limit of the key.", labels=["key"])
        tokens = CounterMetricFamily(f"{_PREFIX}key_tokens", "Tokens of prompts and answers, by key.", labels=["key"])
        running = GaugeMetricFamily(f"{_PREFIX}key_requests_in_flight", "Requests that run, by key.", labels=["key"])
        for tenant in self._tenants():
            requests.add_metric([tenant.name], tenant.num_requests_total)
            refusals.add_metric([tenant.name], tenant.num_refusals_total)
            tokens.add_metric([tenant.name], tenant.num_tokens_total)
            running.add_metric([tenant.name], tenant.num_requests)
        yield from (requests, refusals, tokens, running)


def _metric(name: str, value: float | Mapping[int, float], *, counts: bool) -> Metric:
    """Values by a number of streams have it as a label."""
    help = HELP[name.removeprefix(_PREFIX)]
    if not isinstance(value, Mapping):
        return (CounterMetricFamily if counts else GaugeMetricFamily)(name, help, value=value)
    family = CounterMetricFamily(name, help, labels=["streams"])
    for streams, number in sorted(value.items()):
        family.add_metric([str(streams)], number)
    return family


def _counter(registry: CollectorRegistry, name: str, words: str, *labels: str) -> Counter:
    return Counter(_PREFIX + name, words, labels, registry=registry)


def _histogram(registry: CollectorRegistry, name: str, words: str) -> Histogram:
    return Histogram(_PREFIX + name, words, buckets=_SECONDS, registry=registry)
