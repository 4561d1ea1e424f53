"""What is the same for every request: ids, paths with a slash at their end, the log, probes by HEAD."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.log_lines import JsonFormatter
from tests.frontend.scripted import info
from tests.server.conftest import Serve

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "say it"}]


async def test_a_request_id_is_taken_returned_and_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    running = await serve()
    reply = await running.post(CHAT, {"messages": ASK}, headers={"X-Request-Id": "mine-7"})
    assert reply.headers["x-request-id"] == "mine-7"
    assert any(f'"POST {CHAT} HTTP/1.1" 200 mine-7' in message for message in caplog.messages)


@pytest.mark.parametrize("sent", [None, "", "two words", "x" * 129, "h\u00e9"])
async def test_a_request_without_a_usable_id_gets_one(serve: Serve, sent: str | None) -> None:
    running = await serve()
    headers = {} if sent is None else {b"x-request-id": sent.encode()}
    async with httpx.AsyncClient(base_url=running.url) as client:
        ids = [(await client.get("/nothing", headers=headers)).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert sent not in ids


async def test_the_openai_client_shows_the_id(serve: Serve, openai_client: Callable[..., AsyncOpenAI]) -> None:
    client = openai_client(await serve())
    reply = await client.chat.completions.create(model="model", messages=ASK, extra_headers={"x-request-id": "a-1"})
    assert reply._request_id == "a-1"


async def test_queries_are_not_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    running = await serve()
    async with httpx.AsyncClient(base_url=running.url) as client:
        await client.get("/version?api_key=secret")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("dashinfer_vlm", "uvicorn"))]
    assert any("GET /version" in message for message in ours)
    assert not any("secret" in message for message in ours)


async def test_a_path_cannot_write_lines_of_its_own_into_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    await (await serve()).get("/a%0Aforged")
    assert not any("\n" in message for message in caplog.messages)


async def test_a_slash_at_the_end_of_a_path_changes_nothing(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("key",)})
    assert (await running.get("/health/")).status_code == 200
    reply = await running.post(f"{CHAT}/", {"messages": ASK}, headers={"Authorization": "Bearer key"})
    assert reply.json()["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_answer_head(serve: Serve, path: str) -> None:
    running = await serve()
    async with httpx.AsyncClient(base_url=running.url) as client:
        reply = await client.head(path)
    assert (reply.status_code, reply.content) == (200, b"")


async def test_answers_carry_a_fingerprint_that_stays(serve: Serve, openai_client: Callable[..., AsyncOpenAI]) -> None:
    client = openai_client(await serve())
    whole = await client.chat.completions.create(model="model", messages=ASK)
    chunks = [c async for c in await client.chat.completions.create(model="model", messages=ASK, stream=True)]
    text = await client.completions.create(model="model", prompt="a")
    assert whole.system_fingerprint is not None
    assert whole.system_fingerprint.startswith("fp_")
    assert {c.system_fingerprint for c in chunks} == {whole.system_fingerprint, text.system_fingerprint}


async def test_an_adapter_gives_another_fingerprint(serve: Serve) -> None:
    prints = []
    for lora in (None, "adapters/a", "adapters/b"):
        running = await serve(engine={"info": msgspec.structs.replace(info(), lora=lora)})
        prints.append((await running.post(CHAT, {"messages": ASK})).json()["system_fingerprint"])
    assert len(set(prints)) == 3


async def test_idle_connections_are_kept_longer_than_proxies_keep_theirs(serve: Serve) -> None:
    assert (await serve()).server.config.timeout_keep_alive == 75
    assert (await serve(config={"keep_alive_s": 120.0})).server.config.timeout_keep_alive == 120


def facts(caplog: pytest.LogCaptureFixture, path: str = CHAT) -> dict[str, Any]:
    """What the one line about `path` says, as fields."""
    (found,) = [r.facts for r in caplog.records if getattr(r, "facts", {}).get("path") == path]  # type: ignore[attr-defined]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_line_with_tokens_and_times(
    serve: Serve, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    running = await serve("hello", engine={"num_cached_tokens": 2})
    reply = await running.post(CHAT, {"messages": ASK, "stream": stream}, headers={"x-request-id": "mine-7"})
    told = facts(caplog)
    assert (told["status"], told["request_id"], told["complete"]) == (200, "mine-7", True)
    assert (told["output_tokens"], told["cached_tokens"]) == (4, 2)
    assert stream or told["prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert 0 < told["first_token_seconds"] <= told["seconds"] < 60
    assert f"{told['prompt_tokens']}+4 tokens, 2 cached, first after" in caplog.messages[-1]


async def test_a_client_that_leaves_is_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    running = await serve("hello", engine={"pauses_after": 1})
    body = {"messages": ASK, "stream": True}
    async with httpx.AsyncClient(base_url=running.url) as client, client.stream("POST", CHAT, json=body) as reply:
        await reply.aiter_bytes().__anext__()
    await running.service.drain(timeout_s=60)
    told = facts(caplog)
    assert (told["status"], told["complete"], told["output_tokens"]) == (200, False, 1)


async def test_the_log_holds_no_prompts_answers_media_or_keys(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running = await serve("the-answer", config={"api_keys": ("the-key",)})
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,dGhlLXBpY3R1cmU="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "the-question"}, picture]}]
    key = {"Authorization": "Bearer the-key"}
    for body in ({"messages": messages}, {"messages": messages, "stream": True}, {"messages": messages, "n": -1}):
        await running.post(CHAT, body, headers=key)
    await running.post(CHAT, {"messages": messages}, headers={"Authorization": "Bearer the-wrong-key"})
    ours = [record for record in caplog.records if record.name.startswith(("dashinfer_vlm", "uvicorn"))]
    lines = [formatter.format(record) for record in ours for formatter in (logging.Formatter(), JsonFormatter())]
    assert len(lines) >= 8
    for word in ("the-answer", "the-key", "the-wrong", "the-question", "dGhlLXB", "the-picture"):
        assert not any(word in line for line in lines), word
