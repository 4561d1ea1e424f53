"""Whose a key is, what that one may take, and how keys change while the server runs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server import files
from dashinfer_vlm.server.auth import read_keys
from tests.frontend.scripted import info
from tests.server.conftest import Running, Serve

CHAT = "/v1/chat/completions"
ASK: Any = {"messages": [{"role": "user", "content": "say it"}]}
PICTURE: Any = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/p"}}]}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def chat(running: Running, key: str, body: Any = ASK, **more: Any) -> httpx.Response:
    return await running.post(CHAT, {**body, **more}, headers=bearer(key))


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"alice": {"keys": ["a1", "a2"]}, "bob": {"keys": ["b"], "max_concurrent": 1}}))
    return path


def names_of(**config: Any) -> dict[str, tuple[str, ...]]:
    return {name: holder.keys for name, holder in read_keys(ServerConfig(**config)).items()}


@pytest.mark.parametrize("text", ["one", '{"alice": {"keys": ["one"]}}'])
def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text, encoding="utf-8-sig")
    assert list(names_of(api_keys_file=str(tmp_path / "keys")).values()) == [("one",)]


def test_keys_come_from_the_flag_and_from_the_file(tmp_path: Path, keys: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n  two  \n")
    assert names_of(api_keys=("zero",), api_keys_file=str(path)) == {
        "key-1": ("zero",),
        "key-2": ("one",),
        "key-3": ("two",),
    }
    named = {"key-1": ("zero",), "alice": ("a1", "a2"), "bob": ("b",)}
    assert names_of(api_keys=("zero",), api_keys_file=str(keys)) == named
    assert names_of() == {}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("\n", "holds no key; write one per line"),
        ("{}", "holds no key"),
        ('{"a": {"keys": []}}', "length >= 1"),
        ('{"a": {"keys": [""]}}', "length >= 1"),
        ('{"a": {"keys": ["secret"], "requests": 1}}', "unknown field `requests`"),
        ('{"a": {"keys": ["secret"], "max_concurrent": 0}}', r"max_concurrent"),
        ('{"a": {"keys": "secret"}}', "Expected `array`"),
        ('{"a b": {"keys": ["secret"]}}', "has the name 'a b'"),
        ('{"a": {"keys": ["secret"]}, "b": {"keys": ["secret"]}}', "a and b have the same key"),
        ('{"key-1": {"keys": ["secret"]}}', "has the name key-1, as keys without a name are called"),
        ('{"a": {"keys": ["secret"}', "malformed"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_telling_a_key(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told) as error:
        read_keys(ServerConfig(api_keys=("zero",), api_keys_file=str(path)))
    assert "secret" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(ServerConfig(api_keys_file=str(tmp_path / "absent")))


async def test_keys_are_compared_as_the_bytes_that_were_sent(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("sécret",)})
    for header in ("Authorization", "x-api-key"):
        value = "Bearer sécret" if header == "Authorization" else "sécret"
        reply = await running.get("/v1/models", headers=[(header.encode(), value.encode())])
        assert reply.status_code == 200


async def test_a_file_that_changes_is_read_again_and_a_wrong_one_changes_nothing(
    serve: Serve, keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_LOOK_S", 0.0)
    running = await serve(config={"api_keys_file": str(keys)})

    async def status(key: str) -> int:
        reply = await running.get("/version", headers=bearer(key))
        assert isinstance(reply, httpx.Response)
        return reply.status_code

    assert [await status(key) for key in ("a1", "a2", "b", "c")] == [200, 200, 200, 401]
    write(keys, '{"alice": {"keys": ["a2"]}, "carol": {"keys": ["c"]}}')
    assert [await status(key) for key in ("a1", "a2", "b", "c")] == [401, 200, 401, 200]
    caplog.set_level(logging.ERROR)
    for wrong in ("{", ""):
        write(keys, wrong)
        assert [await status(key) for key in ("a1", "a2", "b", "c")] == [401, 200, 401, 200]
        assert "the keys before are still used" in caplog.text
        caplog.clear()
    os.remove(keys)
    assert await status("a2") == 200
    write(keys, "fresh")
    assert [await status(key) for key in ("a2", "fresh")] == [401, 200]


async def test_a_key_without_a_name_keeps_what_is_its_own_when_others_change_places(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOOK_S", 0.0)
    path = tmp_path / "keys"
    write(path, "one\ntwo\n")
    running = await serve(config={"api_keys_file": str(path), "key_requests_per_minute": 1.0})
    assert (await chat(running, "two")).status_code == 200
    write(path, "two\nthree\n")
    assert [(await chat(running, key)).status_code for key in ("two", "three")] == [429, 200]
    first, second = (request.cache_salt for request in running.engine.requests)
    assert "" != first != second != ""


async def test_a_key_over_its_rate_is_429_with_the_time_to_wait(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("a", "b"), "key_requests_per_minute": 2.0})
    assert [(await chat(running, "a")).status_code for _ in range(2)] == [200, 200]
    refused = await chat(running, "a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert (await running.get("/v1/models", headers=bearer("a"))).status_code == 200, "looking costs nothing"
    assert (await chat(running, "b")).status_code == 200
    assert len(running.engine.requests) == 3


async def test_tokens_of_prompts_and_answers_are_counted(serve: Serve) -> None:
    running = await serve("hello " * 50, config={"api_keys": ("a",), "key_tokens_per_minute": 60.0})
    assert (await chat(running, "a", stream=True)).status_code == 200
    refused = await chat(running, "a")
    assert refused.status_code == 429
    assert "tokens per minute" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 1


async def test_a_stream_holds_its_place_until_it_ends(serve: Serve, keys: Path) -> None:
    running = await serve("hello", engine={"pauses_after": 1}, config={"api_keys_file": str(keys)})
    asking = asyncio.create_task(chat(running, "b", stream=True))
    await running.engine.paused.wait()
    refused = await chat(running, "b")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    running.engine.resume.set()
    assert (await asking).text.endswith("data: [DONE]\n\n")
    assert (await chat(running, "b")).status_code == 200


async def test_one_key_cannot_take_all_places_from_the_others(serve: Serve) -> None:
    running = await serve(
        engine={"pauses_after": 1, "info": info(max_num_seqs=4)},
        config={"api_keys": ("a", "b"), "max_queued_requests": 4},
    )
    asked = [asyncio.create_task(chat(running, "a")) for _ in range(4)]
    while running.service.num_in_flight < 4:
        await asyncio.wait(asked, timeout=0.01)
    refused = await chat(running, "a")
    assert (refused.status_code, "left for others" in refused.text) == (429, True)
    asked.append(asyncio.create_task(chat(running, "b")))
    while running.service.num_in_flight < 5:
        await asyncio.wait(asked, timeout=0.01)
    running.engine.resume.set()
    assert {(await each).status_code for each in asked} == {200}


async def test_keys_share_no_cache_and_a_requests_own_salt_divides_further(serve: Serve, keys: Path) -> None:
    running = await serve(config={"api_keys_file": str(keys)})
    for key, salt in (("a1", None), ("a2", None), ("b", None), ("a1", "mine"), ("b", "mine")):
        assert (await chat(running, key, PICTURE, cache_salt=salt)).status_code == 200
    first, second, *others = (request.cache_salt for request in running.engine.requests)
    assert first == second, "both are Alice's"
    assert len({first, *others}) == 4
    assert running.loader.salts == ["alice", "alice", "bob", "alice", "bob"]


async def test_a_single_key_shares_with_nobody_and_salts_nothing(serve: Serve) -> None:
    running = await serve(config={"api_keys": ("a",)})
    await chat(running, "a", PICTURE)
    assert (running.engine.requests[0].cache_salt, running.loader.salts) == ("", [""])


async def test_metrics_and_log_say_who_without_the_key(
    serve: Serve, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    running = await serve("hello", engine={"pauses_after": 1}, config={"api_keys_file": str(keys)})
    asking = asyncio.create_task(chat(running, "b"))
    await running.engine.paused.wait()
    assert (await chat(running, "b")).status_code == 429
    running.engine.resume.set()
    await asking
    assert (await chat(running, "wrong")).status_code == 401
    metrics = (await running.get("/metrics", headers=bearer("a1"))).text
    for line in (
        'dashinfer_key_requests_total{key="bob"} 1.0',
        'dashinfer_key_requests_total{key="alice"} 0.0',
        'dashinfer_key_refusals_total{key="bob"} 1.0',
        'dashinfer_key_requests_in_flight{key="bob"} 0.0',
        'dashinfer_refusals_total{reason="key_concurrency"} 1.0',
        'dashinfer_refusals_total{reason="invalid_api_key"} 1.0',
    ):
        assert line in metrics.splitlines()
    spent = next(line for line in metrics.splitlines() if line.startswith('dashinfer_key_tokens_total{key="bob"}'))
    assert float(spent.split()[1]) > 5
    lines = [message for message in caplog.messages if CHAT in message]
    assert [" bob " in line for line in lines if " 200 " in line] == [True]
    assert not any("bearer" in message.lower() for message in caplog.messages)
