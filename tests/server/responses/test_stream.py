"""The events of a response, in OpenAI's order and shape."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from dashinfer_vlm.server.responses.store import ResponseStore
from tests.server.conftest import Parts, Running, Serve
from tests.server.responses.conftest import events
from tests.server.responses.test_create import CALL, WEATHER, Sight
from tests.server.test_reasoning import THOUGHT

Client = Callable[..., AsyncOpenAI]
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done"]
TEXT += ["content_part.done", "output_item.done"]


async def told(running: Running, **body: Any) -> list[dict[str, Any]]:
    """All events; each of them is what the client's own types say, and they are numbered from 0 on."""
    found = await events(running, {"input": "x"} | body)
    for event in found:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def names(found: list[dict[str, Any]]) -> list[str]:
    """The kinds of events, each once where several of a kind follow each other."""
    kinds = [event["type"].removeprefix("response.") for event in found]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]


async def test_a_text_comes_item_part_and_deltas(serve: Serve) -> None:
    found = await told(await serve("qz wv"))
    assert names(found) == ["created", "in_progress", *TEXT, "completed"]
    assert [found[0]["response"][name] for name in ("status", "output", "usage")] == ["in_progress", [], None]
    item, part = found[2]["item"], found[3]["part"]
    assert (item["status"], item["content"], item["role"]) == ("in_progress", [], "assistant")
    assert part == {"type": "output_text", "text": "", "logprobs": [], "annotations": []}
    assert "".join(event["delta"] for event in found if event["type"].endswith("delta")) == "qz wv"
    done = found[-1]["response"]
    assert found[-2]["item"] == done["output"][0]
    assert (done["status"], done["output"][0]["status"]) == ("completed", "completed")
    assert done["output"][0]["content"][0]["text"] == "qz wv"
    assert done["usage"]["output_tokens"] > 1


async def test_reasoning_comes_before_the_text(thinking: Parts) -> None:
    async with thinking.running(THOUGHT) as running:
        found = await told(running)
    thought = [name.replace("output_text", "reasoning_text") for name in TEXT]
    assert names(found) == ["created", "in_progress", *thought, *TEXT, "completed"]
    assert {event["output_index"] for event in found if "output_index" in event} == {0, 1}
    reasoning = found[-1]["response"]["output"][0]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, so\n\nyes"}]
    assert reasoning["summary"] == []


async def test_calls_come_as_their_arguments(serve: Serve) -> None:
    found = await told(await serve(f"I ask.\n{CALL}\n{CALL}"), tools=[WEATHER])
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert names(found) == ["created", "in_progress", *TEXT, *call, *call, "completed"]
    added = [event["item"] for event in found if event["type"] == "response.output_item.added"][1:]
    assert [(item["name"], item["arguments"], item["status"]) for item in added] == [("weather", "", "in_progress")] * 2
    done = found[-1]["response"]["output"][1:]
    assert [item["arguments"] for item in done] == ['{"city": "Paris"}'] * 2
    assert len({item["call_id"] for item in done} | {item["id"] for item in done}) == 4


async def test_a_stream_that_the_limit_cuts_ends_incomplete(serve: Serve) -> None:
    found = await told(await serve("one two three four"), max_output_tokens=2)
    assert names(found) == ["created", "in_progress", *TEXT, "incomplete"]
    assert found[-2]["item"]["status"] == "incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_stream_that_breaks_ends_failed(serve: Serve) -> None:
    found = await told(await serve("one two three", engine={"failure": "no memory", "fails_after": 2}))
    assert names(found) == ["created", "in_progress", *TEXT, "failed"]
    response = found[-1]["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "no memory"})
    assert response["output"][0]["status"] == "incomplete"


async def test_a_response_that_has_failed_is_kept(serve: Serve) -> None:
    running = await serve("one two three", engine={"failure": "no memory", "fails_after": 2})
    response = (await told(running))[-1]["response"]
    assert (response["status"], response["store"]) == ("failed", True)
    assert (await running.get(f"/v1/responses/{response['id']}")).json() == response


async def test_a_response_that_could_not_be_kept_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ResponseStore, "put", full)
    response = (await events(await serve("one"), {"input": "x"}))[-1]["response"]
    assert (response["status"], response["store"]) == ("failed", False)


async def test_what_fails_before_the_first_token_is_told_by_the_status(serve: Serve) -> None:
    running = await serve("x", engine={"failure": "no memory", "fails_after": 0})
    assert (await running.post("/v1/responses", {"input": "x", "stream": True})).status_code == 500


async def test_log_probabilities_are_told_with_the_text(serve: Serve) -> None:
    found = await told(await serve("qz"), include=["message.output_text.logprobs"])
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [row["token"] for event in deltas for row in event["logprobs"]] == ["q", "z"]
    assert [row["token"] for row in found[-1]["response"]["output"][0]["content"][0]["logprobs"]] == ["q", "z"]


async def test_the_client_parses_a_stream(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve('{"shape": "circle", "colour": "red"}'))
    async with client.responses.stream(model="model", input="look", text_format=Sight) as stream:
        async for _ in stream:
            pass
        response = await stream.get_final_response()
    assert response.output_parsed == Sight(shape="circle", colour="red")


async def test_a_client_that_leaves_ends_its_response(serve: Serve, openai_client: Client) -> None:
    running = await serve("one two three", engine={"pauses_after": 2})
    stream = await openai_client(running).responses.create(model="model", input="x", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1
