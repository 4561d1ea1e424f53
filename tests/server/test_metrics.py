"""What Prometheus reads after requests of every fate."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.media.loader import MediaCounters
from dashinfer_vlm.server.metrics import HELP, Metrics
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
