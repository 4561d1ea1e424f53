"""Responses that are kept: found again, gone on with, deleted, cancelled, and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.server.responses import kept
from dashinfer_vlm.server.responses.items import AnyItem
from dashinfer_vlm.server.responses.store import Kept, ResponseStore
from tests.server.conftest import Parts, Serve
from tests.server.responses.conftest import prompt_of
from tests.server.responses.test_create import LOOK, PICTURE

Client = Callable[..., AsyncOpenAI]


async def polled(client: AsyncOpenAI, id: str) -> Any:
    """A response in the background once it is over."""
    while True:
        response = await client.responses.retrieve(id)
        if response.status != "in_progress":
            return response


async def test_a_response_is_found_again_and_gone_on_with(
    serve: Serve, openai_client: Client, tokenizer: Tokenizer
) -> None:
    running = await serve("A dog.")
    client = openai_client(running)
    first = await client.responses.create(model="model", input=LOOK, instructions="Be brief.", metadata={"of": "me"})
    assert await client.responses.retrieve(first.id) == first
    second = await client.responses.create(model="model", input="Sure?", previous_response_id=first.id)
    third = await client.responses.create(model="model", input="Really?", previous_response_id=second.id)
    assert (third.previous_response_id, third.instructions, third.metadata) == (second.id, None, {})
    assert [item.content_hash.strip() for item in running.engine.requests[2].items] == [PICTURE.encode()]
    turns = prompt_of(running, tokenizer).split("<|im_start|>")
    assert [turn.split("\n")[0] for turn in turns[2:]] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert turns[-2:] == ["user\nReally?<|im_end|>\n", "assistant\n"]


async def test_the_items_of_an_input_are_listed_page_by_page(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve("A dog."))
    turns: Any = [{"role": "developer", "content": "Be brief."}, *LOOK, {"role": "user", "content": "Well?"}]
    response = await client.responses.create(model="model", input=turns)
    listed = [item async for item in client.responses.input_items.list(response.id, limit=2, order="asc")]
    assert [item.role for item in listed] == ["developer", "user", "user"]  # type: ignore[union-attr]
    assert [part.type for part in listed[1].content] == ["input_text", "input_image"]  # type: ignore[union-attr]
    assert len({item.id for item in listed}) == 3
    newest = await client.responses.input_items.list(response.id, limit=1)
    assert (newest.data[0].id, newest.has_more) == (listed[2].id, True)


async def test_an_item_is_named_instead_of_sent(serve: Serve, openai_client: Client, tokenizer: Tokenizer) -> None:
    running = await serve("A dog.")
    client = openai_client(running)
    first = await client.responses.create(model="model", input="What?")
    named: Any = [
        {"role": "user", "content": "What?"},
        {"type": "item_reference", "id": first.output[0].id},
        {"role": "user", "content": "Sure?"},
    ]
    await client.responses.create(model="model", input=named)
    by_name = prompt_of(running, tokenizer)
    await client.responses.create(model="model", input="Sure?", previous_response_id=first.id)
    assert prompt_of(running, tokenizer) == by_name
    with pytest.raises(openai.NotFoundError, match="Item with id"):
        await client.responses.create(model="model", input=[{"type": "item_reference", "id": "msg_x_0"}])


async def test_what_is_not_stored_or_deleted_is_not_found(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve())
    forgotten = (await client.responses.create(model="model", input="x", store=False)).id
    deleted = (await client.responses.create(model="model", input="x")).id
    await client.responses.delete(deleted)
    for id in (forgotten, deleted):
        with pytest.raises(openai.NotFoundError, match="not found"):
            await client.responses.delete(id)
        with pytest.raises(openai.NotFoundError, match="not found"):
            await client.responses.retrieve(id)
        with pytest.raises(openai.BadRequestError, match="not found") as caught:
            await client.responses.create(model="model", input="x", previous_response_id=id)
        assert caught.value.code == "previous_response_not_found"


async def test_a_stream_is_stored_before_its_end_is_told(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve("A dog."))
    async for event in await client.responses.create(model="model", input="x", stream=True):
        if event.type == "response.completed":
            assert (await client.responses.retrieve(event.response.id)).output_text == "A dog."
            return
    pytest.fail("no end was told")


async def test_one_key_does_not_see_what_another_has_said(serve: Serve, openai_client: Client) -> None:
    running = await serve(config={"api_keys": ("mine", "yours")})
    mine, yours = openai_client(running, api_key="mine"), openai_client(running, api_key="yours")
    response = await mine.responses.create(model="model", input="a secret")
    assert (await mine.responses.retrieve(response.id)).id == response.id
    for attempt in (
        yours.responses.retrieve(response.id),
        yours.responses.cancel(response.id),
        yours.responses.delete(response.id),
        yours.responses.create(model="model", input=[{"type": "item_reference", "id": response.output[0].id or ""}]),
    ):
        with pytest.raises(openai.NotFoundError):
            await attempt
    with pytest.raises(openai.NotFoundError):
        await yours.responses.input_items.list(response.id)
    with pytest.raises(openai.BadRequestError):
        await yours.responses.create(model="model", input="x", previous_response_id=response.id)
    assert (await mine.responses.retrieve(response.id)).id == response.id


async def test_a_response_in_the_background_is_polled(serve: Serve, openai_client: Client) -> None:
    running = await serve("one two", engine={"pauses_after": 1})
    client = openai_client(running)
    begun = await client.responses.create(model="model", input="x", background=True)
    assert (begun.status, begun.background) == ("in_progress", True)
    await running.engine.paused.wait()
    assert (await client.responses.retrieve(begun.id)).status == "in_progress"
    assert [item async for item in client.responses.input_items.list(begun.id)]
    running.engine.resume.set()
    await running.engine.idle.wait()
    response = await polled(client, begun.id)
    assert (response.status, response.output_text) == ("completed", "one two")
    assert await client.responses.cancel(begun.id) == response


async def test_a_response_in_the_background_counts_as_a_request_of_its_key(serve: Serve, openai_client: Client) -> None:
    limits = {"api_keys": ("mine",), "key_max_concurrent": 1}
    running = await serve("one two", engine={"pauses_after": 1}, config=limits)
    client = openai_client(running, api_key="mine")
    begun = await client.responses.create(model="model", input="x", background=True)
    await running.engine.paused.wait()
    with pytest.raises(openai.RateLimitError):
        await client.responses.create(model="model", input="y")
    running.engine.resume.set()
    assert (await polled(client, begun.id)).status == "completed"
    await client.responses.create(model="model", input="y")


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a response is being stored, which then takes a while."""
    storing, put = asyncio.Event(), ResponseStore.put

    async def slow_put(self: ResponseStore, tenant: str, kept: Kept) -> None:
        storing.set()
        await asyncio.sleep(0.1)
        await put(self, tenant, kept)

    monkeypatch.setattr(ResponseStore, "put", slow_put)
    return storing


@pytest.mark.usefixtures("slow_store")
async def test_a_response_in_the_background_that_is_over_can_be_gone_on_with(
    serve: Serve, openai_client: Client
) -> None:
    client = openai_client(await serve("one two"))
    begun = await client.responses.create(model="model", input="x", background=True)
    assert (await polled(client, begun.id)).status == "completed"
    await client.responses.create(model="model", input="y", previous_response_id=begun.id)


async def test_a_response_in_the_background_that_is_over_is_stored_whoever_cancels_it(
    serve: Serve, openai_client: Client, slow_store: asyncio.Event
) -> None:
    client = openai_client(await serve("one two"))
    begun = await client.responses.create(model="model", input="x", background=True)
    await slow_store.wait()
    told = await client.responses.cancel(begun.id)
    assert told.status == "completed"
    assert await client.responses.retrieve(begun.id) == told


async def test_a_response_in_the_background_is_cancelled(serve: Serve, openai_client: Client) -> None:
    running = await serve("one two", engine={"pauses_after": 1})
    client = openai_client(running)
    begun = await client.responses.create(model="model", input="x", background=True)
    await running.engine.paused.wait()
    cancelled = await client.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1
    assert await client.responses.retrieve(begun.id) == cancelled


async def test_a_response_in_the_background_tells_its_failure(serve: Serve, openai_client: Client) -> None:
    running = await serve("one two", engine={"failure": "no memory"})
    client = openai_client(running)
    begun = await client.responses.create(model="model", input="x", background=True)
    response = await polled(client, begun.id)
    assert response.status == "failed"
    assert response.error is not None
    assert (response.error.code, response.error.message) == ("server_error", "no memory")


async def test_a_response_that_somebody_waits_for_cannot_be_cancelled(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve())
    response = await client.responses.create(model="model", input="x")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await client.responses.cancel(response.id)


@pytest.mark.parametrize("query", ["stream=true", "starting_after=3", "nonsense=1"])
async def test_a_response_is_not_streamed_again(serve: Serve, query: str) -> None:
    running = await serve()
    id = (await running.post("/v1/responses", {"input": "x"})).json()["id"]
    reply = await running.get(f"/v1/responses/{id}?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.split("=")[0])


async def test_responses_outlive_their_server_in_a_file(parts: Parts, openai_client: Client, tmp_path: Path) -> None:
    config = {"responses_store": str(tmp_path / "responses.sqlite")}
    async with parts.running("A dog.", config=config) as running:
        response = await openai_client(running).responses.create(model="model", input="x")
    async with parts.running("A cat.", config=config) as running:
        assert await openai_client(running).responses.retrieve(response.id) == response


async def test_a_server_that_keeps_nothing_says_so(serve: Serve) -> None:
    running = await serve(config={"responses_store_mib": 0})
    reply = (await running.post("/v1/responses", {"input": "x"})).json()
    assert reply["store"] is False
    assert (await running.get(f"/v1/responses/{reply['id']}")).status_code == 404
    refused = await running.post("/v1/responses", {"input": "x", "background": True})
    assert refused.json()["error"]["param"] == "background"


async def test_an_input_that_is_too_large_to_be_stored_is_refused_before_it_is_answered(serve: Serve) -> None:
    running = await serve(config={"responses_store_mib": 1})
    content = [{"type": "input_image", "image_url": "data:image/png;base64," + "A" * 2**20}]
    body = {"input": [{"role": "user", "content": content}]}
    reply = await running.post("/v1/responses", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "store")
    assert (await running.post("/v1/responses", body | {"store": False})).status_code == 200


async def test_what_is_held_for_responses_counts_against_the_budget_of_bodies(serve: Serve) -> None:
    running = await serve("one two", engine={"pauses_after": 1}, max_body_bytes=2_000)  # 16 times that for all
    text = "x " * 700
    waiting = [asyncio.create_task(running.post("/v1/responses", {"input": text})) for _ in range(40)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    refused = done.pop().result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    running.engine.resume.set()
    assert {reply.status_code for reply in await asyncio.gather(*waiting)} == {200, 429}
    assert (await running.post("/v1/responses", {"input": text})).status_code == 200


async def test_a_conversation_that_is_read_again_counts_too(serve: Serve) -> None:
    running = await serve("y " * 1000, max_body_bytes=500)  # 8,000 for all
    said: dict[str, Any] = {}
    for _ in range(4):
        reply = await running.post("/v1/responses", {"input": "go on", **said})
        said = {"previous_response_id": reply.json().get("id")}
    assert reply.status_code == 429
    assert "bodies of requests hold" in reply.json()["error"]["message"]


async def test_an_item_that_is_named_often_is_read_once_and_counts_as_often(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await serve("x", max_body_bytes=2_000)  # 32,000 for all
    said = (await running.post("/v1/responses", {"input": "y " * 700})).json()["id"]
    name = (await running.get(f"/v1/responses/{said}/input_items")).json()["data"][0]["id"]
    reads: list[Collection[str]] = []
    find = kept.find_items

    def counted(row: Kept, ids: Collection[str]) -> dict[str, tuple[AnyItem, int]]:
        reads.append(ids)
        return find(row, ids)

    monkeypatch.setattr(kept, "find_items", counted)
    for count, status in ((2, 200), (25, 429)):
        body = {"input": [{"type": "item_reference", "id": name}] * count, "store": False}
        reply = await running.post("/v1/responses", body)
        assert (reply.status_code, len(reads)) == (status, 1), reply.text
        reads.clear()


async def test_what_is_still_under_way_cannot_be_continued_and_says_so(serve: Serve) -> None:
    running = await serve("one two", engine={"pauses_after": 1})
    begun = (await running.post("/v1/responses", {"input": "x", "background": True})).json()["id"]
    reply = await running.post("/v1/responses", {"input": "x", "previous_response_id": begun})
    assert (reply.status_code, "is still in progress" in reply.text) == (400, True)
    running.engine.resume.set()


async def test_responses_in_the_background_hold_no_more_than_the_store(serve: Serve) -> None:
    running = await serve("one two", engine={"pauses_after": 1}, config={"responses_store_mib": 1})
    picture = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 400_000}
    body = {"input": [{"role": "user", "content": [picture]}], "background": True}
    replies = [await running.post("/v1/responses", body) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    running.engine.resume.set()
