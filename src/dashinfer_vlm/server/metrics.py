"""`GET /metrics`: what Prometheus scrapes. Each application has a registry of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.media.loader import MediaCounters

_PREFIX = "dashinfer_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_MEDIA_GAUGES = frozenset({"cache_bytes"})


class Metrics:
    """An Observer that counts for Prometheus; engine and media are asked when somebody scrapes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = registry = CollectorRegistry()
        self._state = _State()
        registry.register(self._state)
        self.replies = Counter(
            f"{_PREFIX}http_replies", "Answers by route and status.", ["route", "status"], registry=registry
        )
        self._in_flight = Gauge(f"{_PREFIX}requests_in_flight", "Choices that are not over.", registry=registry)
        self._in_flight.set_function(lambda: service.num_in_flight)
        self._choices = Counter(
            f"{_PREFIX}choices", "Choices that are over, by how they ended.", ["reason"], registry=registry
        )
        self._prompt = Counter(f"{_PREFIX}prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter(f"{_PREFIX}cached_tokens", "... of them from the prefix cache.", registry=registry)
        self._output = Counter(f"{_PREFIX}output_tokens", "Tokens of answers.", registry=registry)
        self._first = _histogram("time_to_first_token_seconds", "From the request to its first token.", registry)
        self._gap = _histogram("inter_token_seconds", "Between two tokens of an answer.", registry)
        self._whole = _histogram("request_seconds", "From the request to its last token.", registry)

    def tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None:
        self._output.inc(num_tokens)
        if first:
            self._first.observe(seconds)
            return
        for _ in range(num_tokens):
            self._gap.observe(seconds / num_tokens)

    def ended(self, *, num_prompt_tokens: int, num_cached_tokens: int, reasons: list[str], seconds: float) -> None:
        self._prompt.inc(num_prompt_tokens)
        self._cached.inc(num_cached_tokens)
        self._whole.observe(seconds)
        for reason in reasons:
            self._choices.labels(reason).inc()

    async def render(self) -> bytes:
        """The text format; without an engine its figures are absent and `dashinfer_engine_up` is 0."""
        try:
            stats = await self._service.engine.stats()
        except EngineDeadError:
            stats = None
        self._state.update(stats, self._service.prompts.loader.counters)
        return generate_latest(self.registry)


class ReplyCounter:
    """ASGI middleware that counts answers; paths that are no route are one label, so that nobody can invent more."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.replies.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)


def metrics_routes(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
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


def _metric(name: str, value: float, *, counts: bool) -> Metric:
    words = name.removeprefix(_PREFIX).removesuffix("_total").replace("_", " ")
    if counts:
        return CounterMetricFamily(name, f"Total of {words}.", value=value)
    return GaugeMetricFamily(name, f"Present {words}.", value=value)


def _histogram(name: str, words: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(_PREFIX + name, words, buckets=_SECONDS, registry=registry)
