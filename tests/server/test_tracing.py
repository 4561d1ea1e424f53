"""Spans of requests, as an OpenTelemetry collector gets them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.tracing import Tracer, check
from dashinfer_vlm.stages import Span
from tests.server.conftest import Running, Serve

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def question(url: str = "https://example.org/secret.png") -> Any:
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "the secret question"}, picture]}]


async def spans_of(
    running: Running, tracer: Tracer, exporter: InMemorySpanExporter, **options: Any
) -> list[ReadableSpan]:
    body = {"messages": question(), "max_tokens": 9, "temperature": 0.5}
    assert (await running.post(CHAT, body, **options)).status_code == 200
    tracer.close()
    return list(exporter.get_finished_spans())


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Tracer:
    return Tracer(exporter)


STAGES = (Span("prefill_wait", 1.0, 2.0), Span("prefill", 2.0, 4.0))


async def test_a_call_is_a_span_with_its_stages_below(
    serve: Serve, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    running = await serve("hello", tellers=(tracer.tell,), engine={"spans": STAGES})
    spans = await spans_of(running, tracer, exporter, headers={"x-request-id": "mine-7"})
    (call,) = [span for span in spans if span.name == "llm_request"]
    assert call.attributes is not None
    assert call.attributes["gen_ai.request.id"] == "mine-7"
    assert call.attributes["gen_ai.request.max_tokens"] == 9
    assert call.attributes["gen_ai.request.temperature"] == 0.5
    assert call.attributes["gen_ai.usage.completion_tokens"] == 4
    assert call.attributes["gen_ai.latency.time_in_queue"] == 1.0
    assert call.attributes["gen_ai.latency.time_in_model_prefill"] == 2.0
    assert call.attributes["gen_ai.response.finish_reasons"] == "stop"
    below = {span.name: span for span in spans if span.parent and span.parent.span_id == call.context.span_id}
    assert set(below) == {"prefill_wait", "prefill", "generate", "detokenise"}
    assert below["prefill"].start_time == below["prefill_wait"].end_time
    assert call.resource.attributes["service.name"] == "dashinfer-vlm"


async def test_the_trace_of_a_client_goes_on(serve: Serve, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    running = await serve("hello", tellers=(tracer.tell,))
    spans = await spans_of(running, tracer, exporter, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    (call,) = [span for span in spans if span.name == "llm_request"]
    assert f"{call.context.trace_id:032x}" == TRACE
    assert call.parent is not None
    assert f"{call.parent.span_id:016x}" == PARENT


async def test_traces_hold_no_text_media_or_keys(serve: Serve, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    running = await serve("the answer", tellers=(tracer.tell,), config={"api_keys": ("sesame",)})
    spans = await spans_of(running, tracer, exporter, headers={"Authorization": "Bearer sesame"})
    told = "".join(span.to_json() for span in spans)
    assert not re.search("secret|answer|sesame|example", told)


async def test_what_asks_nothing_of_the_model_leaves_no_trace(
    serve: Serve, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    running = await serve("hello", tellers=(tracer.tell,))
    await running.get("/health")
    await running.post(CHAT, {"messages": []})
    tracer.close()
    assert exporter.get_finished_spans() == ()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """The address of an OTLP receiver over HTTP, and what it has got."""
    got: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
        server.shutdown()


async def test_a_collector_gets_them(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, collector: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    address, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    tracer = Tracer.to(address)
    running = await serve("hello", tellers=(tracer.tell,))
    await running.post(CHAT, {"messages": question()})
    tracer.close()
    names = {s.name for request in got for r in request.resource_spans for scope in r.scope_spans for s in scope.spans}
    assert {"llm_request", "generate"} <= names


def test_an_endpoint_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="it must begin with http://"):
        check("localhost:4317")


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ConfigError, match="carrier-pigeon; it must be grpc or http/protobuf"):
        check("http://localhost:4317")
