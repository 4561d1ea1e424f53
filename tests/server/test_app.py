"""Keys, origins, probes, models, and the end of the server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

import dashinfer_vlm
from dashinfer_vlm.cli.listen import listen
from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.server import run
from tests.server.conftest import Serve

Client = Callable[..., AsyncOpenAI]
CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "say it"}]
KEYS = {"api_keys": ("first", "sécond")}


async def test_a_key_opens_every_route_and_its_absence_none_but_the_probes(serve: Serve) -> None:
    running = await serve(config=KEYS)
    for path in ("/v1/models", "/version", "/nothing", CHAT):
        refused = await running.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert (await running.get(path)).status_code == 200
    assert (await running.get("/v1/models", headers={"Authorization": "Bearer first"})).status_code == 200


@pytest.mark.parametrize("header", ["Bearer wrong", "Bearer", "first", "Basic first", "Bearer first2", ""])
async def test_a_wrong_key_is_401(serve: Serve, header: str) -> None:
    running = await serve(config=KEYS)
    reply = await running.post(CHAT, {"messages": ASK}, headers={"Authorization": header})
    assert reply.status_code == 401
    assert not running.engine.requests


async def test_a_key_may_come_as_anthropics_clients_send_it(serve: Serve) -> None:
    running = await serve(config=KEYS)
    for headers in ({"x-api-key": "first"}, {"X-Api-Key": "first", "Authorization": "Bearer not-needed"}):
        assert (await running.get("/v1/models", headers=headers)).status_code == 200
    for headers in ({"x-api-key": "wrong"}, {"x-api-key": ""}, {"x-api-key": "Bearer first"}):
        assert (await running.get("/v1/models", headers=headers)).status_code == 401


async def test_the_client_raises_its_authentication_error(serve: Serve, openai_client: Client) -> None:
    running = await serve(config=KEYS)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        await openai_client(running, "wrong").models.list()
    assert (await openai_client(running, "first").models.list()).data


async def test_browsers_of_other_origins_may_call_only_where_allowed(serve: Serve) -> None:
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    closed, opened = await serve(), await serve(config={"allowed_origins": ("http://page",), **KEYS})
    assert "access-control-allow-origin" not in (await closed.get("/version", headers=headers)).headers
    reply = await opened.get("/version", headers=headers)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (401, "http://page")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://page"},
        {"Origin": "null"},
        {"Origin": "http://page", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_what_a_browser_sends_for_a_page_of_another_origin_is_refused(
    serve: Serve, headers: dict[str, str]
) -> None:
    """Plain text, as a form or `fetch` sends it without asking first."""
    running = await serve()
    headers = {"Content-Type": "text/plain", **headers}
    reply = await running.post(CHAT, {"messages": ASK}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_refused")
    assert not running.engine.requests
    reply = await running.post("/v1/messages", {"messages": ASK, "max_tokens": 1}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")
    assert (await running.get("/version", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"Origin": "http://here:8000", "Host": "here:8000"}, ()),  # the server's own page, without TLS
        ({"Origin": "https://proxy", "Sec-Fetch-Site": "same-origin"}, ()),  # ... behind a proxy
        ({"Sec-Fetch-Site": "none"}, ()),
        ({"Origin": "http://page", "Sec-Fetch-Site": "cross-site"}, ("http://page",)),
        ({"Origin": "http://page", "Sec-Fetch-Site": "cross-site"}, ("*",)),
    ],
)
async def test_own_pages_and_those_that_are_allowed_may_call(
    serve: Serve, headers: dict[str, str], allowed: tuple[str, ...]
) -> None:
    running = await serve("hello", config={"allowed_origins": allowed})
    assert (await running.post(CHAT, {"messages": ASK}, headers=headers)).status_code == 200


async def test_with_keys_a_key_is_enough(serve: Serve) -> None:
    running = await serve("hello", config=KEYS)
    headers = {"Origin": "app://desktop", "Authorization": "Bearer first"}
    assert (await running.post(CHAT, {"messages": ASK}, headers=headers)).status_code == 200


async def test_the_models_are_listed_by_their_served_names(serve: Serve, openai_client: Client) -> None:
    running = await serve(config={"served_model_name": ("mine/model", "also")})
    client = openai_client(running)
    listed = (await client.models.list()).data
    assert [model.id for model in listed] == ["mine/model", "also"]
    assert listed[0].model_extra == {"root": "mine/model", "max_model_len": 4096}
    assert (await client.models.retrieve("mine/model")).id == "mine/model"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_the_model_goes_by_what_was_loaded_when_no_name_is_given(serve: Serve, openai_client: Client) -> None:
    listed = (await openai_client(await serve()).models.list()).data
    assert [model.id for model in listed] == ["models/scripted"]


async def test_the_version_is_the_packages(serve: Serve) -> None:
    assert (await (await serve()).get("/version")).json() == {"version": dashinfer_vlm.__version__}


async def test_a_signal_lets_running_answers_end(serve: Serve) -> None:
    running = await serve("hello", engine={"pauses_after": 1})
    asking = asyncio.create_task(running.post(CHAT, {"messages": ASK}))
    await running.engine.paused.wait()
    os.kill(os.getpid(), signal.SIGINT)
    while running.service.ready:
        await asyncio.wait((asking,), timeout=0.01)
    running.engine.resume.set()
    assert (await asking).json()["choices"][0]["message"]["content"] == "hello"


async def test_a_signal_ends_answers_that_take_too_long_with_an_error(serve: Serve) -> None:
    running = await serve("hello", engine={"pauses_after": 1}, config={"shutdown_timeout_s": 0.1})
    asking = asyncio.create_task(running.post(CHAT, {"messages": ASK, "stream": True}))
    await running.engine.paused.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    reply = await asking
    assert '"code":"overloaded"' in reply.text
    assert "[DONE]" not in reply.text


async def test_a_server_whose_engine_has_died_ends_with_an_error(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's exit status is then 1, and whoever started it starts another one."""
    monkeypatch.setattr(run, "_TICKS_WITHOUT_ENGINE", 1)
    running = await serve()
    running.engine.is_alive = False
    config = ServerConfig(host="127.0.0.1", port=0, log_level="warning")
    with pytest.raises(EngineDeadError, match="the engine has stopped"):
        await asyncio.wait_for(run.serve(running.service, config, sockets=listen("127.0.0.1", 0)), 60)
