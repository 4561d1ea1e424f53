"""What Prometheus reads after requests of every fate."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.media.types import MediaCounters
from dashinfer_vlm.server.metrics import HELP, Metrics
from dashinfer_vlm.server.token_metrics import TokenMetrics
from dashinfer_vlm.stages import STAGES, Span
from tests.server.conftest import Running, Serve

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "say it"}]


async def scrape(running: Running) -> dict[str, float]:
    """Value by name and labels: `dashinfer_choices_total{reason=stop}`."""
    reply = await running.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(reply.text) for sample in family.samples]
    return {
        sample.name + (f"{{{','.join(f'{k}={v}' for k, v in sample.labels.items())}}}" if sample.labels else ""): value
        for sample in samples
        for value in (sample.value,)
    }


async def test_tokens_and_times_are_counted(serve: Serve) -> None:
    running = await serve("qzqz", engine={"num_cached_tokens": 3})
    body = {"messages": ASK, "n": 2}
    prompt_tokens = (await running.post(CHAT, body)).json()["usage"]["prompt_tokens"]
    found = await scrape(running)
    assert found["dashinfer_prompt_tokens_total"] == prompt_tokens
    assert found["dashinfer_cached_tokens_total"] == 3
    assert found["dashinfer_output_tokens_total"] == 8
    assert found["dashinfer_time_to_first_token_seconds_count"] == 2
    assert found["dashinfer_inter_token_seconds_count"] == 6
    assert found["dashinfer_request_seconds_count"] == 1
    assert found["dashinfer_choices_total{reason=stop}"] == 2
    assert found["dashinfer_requests_in_flight"] == 0


async def test_answers_are_counted_by_route_and_status(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("key",)})
    key = {"Authorization": "Bearer key"}
    await running.post(CHAT, {"messages": ASK}, headers=key)
    await running.post(CHAT, {"messages": []}, headers=key)
    await running.post(CHAT, {"messages": ASK})
    for i in range(3):
        await running.get(f"/invented/{i}", headers=key)
    reply = await running.get("/metrics", headers=key)
    rows = {line for line in reply.text.splitlines() if line.startswith("dashinfer_http_replies_total")}
    assert rows == {
        f'dashinfer_http_replies_total{{route="{CHAT}",status="200"}} 1.0',
        f'dashinfer_http_replies_total{{route="{CHAT}",status="400"}} 1.0',
        f'dashinfer_http_replies_total{{route="{CHAT}",status="401"}} 1.0',
        'dashinfer_http_replies_total{route="other",status="404"} 3.0',
    }


async def test_choices_that_fail_or_are_left_are_counted_as_such(serve: Serve) -> None:
    failing = await serve("hello", engine={"failure": "no"})
    await failing.post(CHAT, {"messages": ASK})
    assert (await scrape(failing))["dashinfer_choices_total{reason=error}"] == 1
    left = await serve("hello", engine={"pauses_after": 1})
    async with httpx.AsyncClient(base_url=left.url) as client:
        asking = asyncio.create_task(client.post(CHAT, json={"messages": ASK}))
        await left.engine.paused.wait()
        asking.cancel()
    await left.service.drain(timeout_s=60)
    assert (await scrape(left))["dashinfer_choices_total{reason=abort}"] == 1


async def test_engine_and_media_figures_stand_beside_them(serve: Serve) -> None:
    running = await serve()
    content = [{"type": "image_url", "image_url": {"url": "a"}}]
    await running.post(CHAT, {"messages": [{"role": "user", "content": content}]})
    found = await scrape(running)
    assert found["dashinfer_engine_up"] == 1
    assert found["dashinfer_engine_num_running"] == 0
    assert "dashinfer_engine_num_preemptions_total" in found
    assert found["dashinfer_media_fetches_total"] == 1
    assert "dashinfer_media_cache_bytes" in found


async def test_seconds_of_decode_stand_by_the_number_of_streams(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await serve()

    async def stats() -> EngineStats:
        return EngineStats(decode_seconds_total={8: 1.5, 2: 0.5}, decode_steps_total={8: 10, 2: 4})

    monkeypatch.setattr(running.engine, "stats", stats)
    found = await scrape(running)
    assert found["dashinfer_engine_decode_seconds_total{streams=2}"] == 0.5
    assert found["dashinfer_engine_decode_seconds_total{streams=8}"] == 1.5
    assert found["dashinfer_engine_decode_steps_total{streams=8}"] == 10


async def test_what_the_engine_runs_has_the_name_that_clients_know(serve: Serve) -> None:
    """Where its files are is nobody's business."""
    found = await scrape(await serve(config={"served_model_name": ("mine", "also")}))
    facts = "device=none,dtype=none,model=mine,quant_type=none,vision_quant_type=none"
    assert {key for key in found if key.startswith("dashinfer_engine_info")} == {f"dashinfer_engine_info{{{facts}}}"}


async def test_a_dead_engine_is_scraped_as_down(serve: Serve) -> None:
    running = await serve()
    running.engine.is_alive = False
    found = await scrape(running)
    assert found["dashinfer_engine_up"] == 0
    assert "dashinfer_engine_num_running" not in found


async def test_requests_in_flight_are_requests_and_models_are_one_route(serve: Serve) -> None:
    running = await serve("hello", engine={"pauses_after": 1})
    asking = asyncio.create_task(running.post(CHAT, {"messages": ASK, "n": 3}))
    await running.engine.paused.wait()
    await running.get("/v1/models/models/scripted")
    await running.get("/v1/models/none")
    found = await scrape(running)
    assert found["dashinfer_requests_in_flight"] == 1
    assert found["dashinfer_http_replies_total{route=/v1/models/{name:path},status=200}"] == 1
    assert found["dashinfer_http_replies_total{route=/v1/models/{name:path},status=404}"] == 1
    running.engine.resume.set()
    await asking
    assert (await scrape(running))["dashinfer_requests_in_flight"] == 0


async def test_a_stream_that_was_left_is_counted_as_aborted(serve: Serve) -> None:
    running = await serve("hello", engine={"pauses_after": 1})
    body = {"messages": ASK, "stream": True}
    async with httpx.AsyncClient(base_url=running.url) as client, client.stream("POST", CHAT, json=body) as reply:
        assert reply.status_code == 200
    await running.service.drain(timeout_s=60)
    await running.engine.idle.wait()
    found = await scrape(running)
    assert found[f"dashinfer_http_replies_total{{route={CHAT},status=aborted}}"] == 1
    assert f"dashinfer_http_replies_total{{route={CHAT},status=200}}" not in found


def test_every_figure_has_a_help_text_of_its_own() -> None:
    fields = [f"engine_{name}" for name in EngineStats.__struct_fields__]
    fields += [f"media_{field.name}" for field in dataclasses.fields(MediaCounters)]
    assert sorted(HELP) == sorted(fields)
    assert len(set(HELP.values())) == len(HELP)


async def test_an_engine_that_does_not_answer_is_scraped_as_down(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process is alive and says nothing."""
    running = await serve()

    async def silence() -> EngineStats:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    monkeypatch.setattr(running.engine, "stats", silence)
    text = (await Metrics(running.service, patience_s=0.05).render()).decode()
    assert "dashinfer_engine_up 0.0" in text


VLLM_DASHBOARD = (
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
)
"""All that vLLM's examples/observability/prometheus_grafana/grafana.json asks for, by `model_name`."""
STAGE_SPANS = (Span("prefill_wait", 1.0, 1.5), Span("encode", 1.5, 2.5), Span("prefill", 1.5, 3.5))


async def test_vllms_dashboard_fills(serve: Serve) -> None:
    running = await serve("hello", config={"served_model_name": ("mine", "other")}, engine={"spans": STAGE_SPANS})
    await running.post(CHAT, {"messages": ASK, "n": 2})
    text = (await running.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    ours = {sample.name for sample in samples if sample.labels.get("model_name") == "mine"}
    assert set(VLLM_DASHBOARD) <= ours
    assert not any(sample.labels.get("model_name") != "mine" for sample in samples if sample.name.startswith("vllm:"))


async def test_figures_under_vllms_names_are_ours(serve: Serve) -> None:
    running = await serve("qzqz", engine={"num_cached_tokens": 3, "spans": STAGE_SPANS})
    body = {"messages": ASK, "n": 2, "max_tokens": 50}
    prompt_tokens = (await running.post(CHAT, body)).json()["usage"]["prompt_tokens"]
    found = await scrape(running)
    rows = ((name, *labels.rstrip("}").split(",")) for name, _, labels in (key.partition("{") for key in found))
    by_labels = {(name, tuple(sorted(labels))): v for (name, *labels), v in zip(rows, found.values(), strict=True)}

    def value(name: str, more: str = "") -> float:
        labels = sorted({"model_name=models/scripted", "engine=0", *filter(None, [more])})
        return by_labels[f"vllm:{name}", tuple(labels)]

    assert value("request_prompt_tokens_sum") == prompt_tokens
    assert value("request_prefill_kv_computed_tokens_sum") == prompt_tokens - 3
    assert value("request_params_n_sum") == 2
    assert value("request_params_max_tokens_sum") == 50
    assert value("request_generation_tokens_count") == 2
    assert value("request_max_num_generation_tokens_count") == 1
    assert value("request_queue_time_seconds_sum") == 1.0
    assert value("request_prefill_time_seconds_sum") == 4.0
    assert value("request_success_total", "finished_reason=stop") == 2
    assert value("request_success_total", "finished_reason=abort") == 0
    assert value("inter_token_latency_seconds_count") == found["dashinfer_inter_token_seconds_count"] == 6
    assert (
        value("inter_token_latency_seconds_bucket", "le=0.01") == found["dashinfer_inter_token_seconds_bucket{le=0.01}"]
    )


async def test_every_stage_has_a_histogram(serve: Serve) -> None:
    running = await serve("hello", engine={"spans": STAGE_SPANS})
    await running.post(CHAT, {"messages": ASK})
    found = await scrape(running)
    counts = {stage: found[f"dashinfer_stage_seconds_count{{stage={stage}}}"] for stage in STAGES}
    assert {stage for stage, count in counts.items() if count} == {"prefill_wait", "encode", "prefill", "detokenise"}
    assert found["dashinfer_stage_seconds_sum{stage=encode}"] == 1.0


async def test_the_process_itself_is_told(serve: Serve) -> None:
    found = await scrape(await serve())
    assert found["process_resident_memory_bytes"] > 2**20
    assert found["process_open_fds"] > 0


def test_gaps_are_counted_as_prometheus_client_would() -> None:
    registry, bounds = CollectorRegistry(), (0.01, 0.1, 1)
    theirs, ours = Histogram("theirs", "Theirs.", buckets=bounds, registry=registry), TokenMetrics("", bounds)
    for num_tokens, seconds in ((1, 0.01), (1, 0.5), (4, 0.2), (1, 7.0), (2, 0.0)):
        ours.waited(num_tokens, seconds)
        for _ in range(num_tokens):
            theirs.observe(seconds / num_tokens)
    (metric,) = theirs.collect()
    counted = {sample.labels["le"]: sample.value for sample in metric.samples if sample.name == "theirs_bucket"}
    assert dict(ours.buckets()) == counted
    assert ours.seconds == pytest.approx(registry.get_sample_value("theirs_sum"))
