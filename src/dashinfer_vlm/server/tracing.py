"""Traces for OpenTelemetry (`--otlp-traces-endpoint`): one span for every call of the model, with vLLM's name and
attributes, and the stages of its media and answers below it. No text, no media, no keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dashinfer_vlm import envs
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.frontend.observer import AnswerReport, CallReport
from dashinfer_vlm.optional import require

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from dashinfer_vlm.server.access import Exchange

_PACKAGE = "dashinfer_vlm"
_FLAG = "--otlp-traces-endpoint"
_EXPORTERS = {"grpc": "grpc", "http/protobuf": "http"}
"""Modules by the values of OTEL_EXPORTER_OTLP_TRACES_PROTOCOL."""


class Tracer:
    """Sends traces in a thread of its own, which drops what an endpoint does not take; `close` sends the rest."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": envs.otel_service()}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_PACKAGE)

    @classmethod
    def to(cls, endpoint: str) -> Tracer:
        """Traces to the OTLP receiver at `endpoint`; raises ConfigError without the packages for it."""
        protocol = envs.otel_protocol()
        require("opentelemetry.sdk.trace", "otel", _FLAG)
        name = f"opentelemetry.exporter.otlp.proto.{_EXPORTERS[protocol]}.trace_exporter"
        exporter: Any = require(name, "otel", _FLAG).OTLPSpanExporter
        return cls(exporter(endpoint=endpoint))

    def tell(self, exchange: Exchange, reports: list[CallReport]) -> None:
        """A trace of each call; those of a client that brings `traceparent` belong to its own trace."""
        for report in reports:
            self._trace(exchange, report)

    def close(self) -> None:
        self._provider.shutdown()

    def _trace(self, exchange: Exchange, report: CallReport) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        epoch_s = time.time() - time.perf_counter()

        def nanoseconds(clock_s: float) -> int:
            return int((clock_s + epoch_s) * 1e9)

        call = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(dict(exchange.headers)),
            kind=SpanKind.SERVER,
            attributes=_attributes(exchange, report),
            start_time=nanoseconds(report.start_s),
        )
        within = set_span_in_context(call)
        for name, start_s, end_s in _stages(report):
            stage = self._tracer.start_span(name, context=within, start_time=nanoseconds(start_s))
            stage.end(nanoseconds(end_s))
        call.end(nanoseconds(report.end_s))


def check(endpoint: str) -> None:
    """Raise ConfigError for an endpoint that traces cannot be sent to; whether anybody is there is not asked."""
    if not endpoint.startswith(("http://", "https://", "grpc://")):
        raise ConfigError(f"{_FLAG} is {endpoint}; it must begin with http://, https:// or grpc://")
    Tracer.to(endpoint).close()


def _stages(report: CallReport) -> Iterator[tuple[str, float, float]]:
    yield from ((span.stage, span.start_s, span.end_s) for span in report.spans)
    for answer in report.answers:
        yield from ((span.stage, span.start_s, span.end_s) for span in answer.spans)
        if answer.first_token_s is not None and answer.last_token_s is not None:
            yield "generate", answer.first_token_s, answer.last_token_s


def _attributes(exchange: Exchange, report: CallReport) -> dict[str, str | int | float]:
    """Named as vLLM names them."""
    sampling = report.sampling
    found: dict[str, str | int | float | None] = {
        "gen_ai.request.id": exchange.request_id,
        "gen_ai.request.n": report.answers_per_prompt,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.num_sequences": len(report.answers),
        "gen_ai.usage.prompt_tokens": report.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": report.num_output_tokens,
        "gen_ai.response.finish_reasons": ",".join(answer.reason for answer in report.answers),
        "gen_ai.latency.time_to_first_token": report.first_token_s,
        "gen_ai.latency.e2e": report.seconds,
        **_latencies(report.answers[0]),
        "http.response.status_code": exchange.status,
    }
    return {name: value for name, value in found.items() if value is not None}


def _latencies(answer: AnswerReport) -> dict[str, float | None]:
    """Of one answer in the engine."""
    seconds = {span.stage: span.seconds for span in answer.spans}
    decode_s = None
    if answer.first_token_s is not None and answer.last_token_s is not None:
        decode_s = answer.last_token_s - answer.first_token_s
    return {
        "gen_ai.latency.time_in_queue": seconds.get("prefill_wait"),
        "gen_ai.latency.time_in_model_prefill": seconds.get("prefill"),
        "gen_ai.latency.time_in_model_decode": decode_s,
    }
