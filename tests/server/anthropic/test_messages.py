"""Anthropic's Messages API through Anthropic's client, over a real socket and a scripted engine."""

from __future__ import annotations

import base64
import json
from typing import Any

import anthropic
import pytest

from dashinfer_vlm.errors import MediaError
from dashinfer_vlm.frontend.params import GenerationParams
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.frontend.scripted import ScriptedLoader
from tests.server.anthropic.conftest import Client
from tests.server.conftest import Running, Serve

ASK: Any = [{"role": "user", "content": "say it"}]
PICTURE = base64.b64encode(b"a picture").decode()
BASE64: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
DATA_URL: Any = {"type": "base64", "media_type": "image/png", "data": f"data:image/png;base64,{PICTURE}"}
URL: Any = {"type": "image", "source": {"type": "url", "url": "http://host/cat.jpg"}}


def prompt_of(running: Running, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(running.engine.requests[-1].prompt_ids, skip_special=False)


async def test_a_message_is_answered(serve: Serve, anthropic_client: Client, tokenizer: Tokenizer) -> None:
    running = await serve("hello", engine={"num_cached_tokens": 3})
    message = await anthropic_client(running).messages.create(model="model", max_tokens=100, messages=ASK)
    assert message.id.startswith("msg_")
    assert message._request_id
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "hello"}]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    usage = message.usage
    num_prompt = len(running.engine.requests[0].prompt_ids)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt - 3, 3)
    assert usage.output_tokens == len(tokenizer.encode_text("hello")) + 1


async def test_the_conversation_reaches_the_model_as_it_would_from_chat(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve("x")
    system = [
        {"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "kind."},
    ]
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, BASE64]},
        {"role": "user", "content": [URL]},
        {"role": "assistant", "content": "A cat."},
        *ASK,
    ]
    await running.post("/v1/messages", {"max_tokens": 5, "system": system, "messages": turns})
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
        {"type": "image_url", "image_url": {"url": "http://host/cat.jpg"}},
    ]
    chat: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": ["Look: ", *pictures]},
        {"role": "assistant", "content": "A cat."},
        *ASK,
    ]
    reply = await running.post("/v1/chat/completions", {"messages": chat})
    assert reply.status_code == 200, reply.text
    ours, theirs = running.engine.requests
    assert ours.prompt_ids == theirs.prompt_ids
    assert "system\nBe kind." in prompt_of(running, tokenizer)
    sources = [str(ref.source) for ref in running.loader.loaded]
    assert [source.rpartition(",")[2] for source in sources] == [PICTURE, "http://host/cat.jpg"] * 2


async def test_a_stream_has_the_events_of_the_api_in_their_order(serve: Serve) -> None:
    running = await serve("hello you")
    reply = await running.post("/v1/messages", {"max_tokens": 50, "messages": ASK, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in reply.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [event["type"] for event in data] == names
    num_deltas = names.count("content_block_delta")
    assert names == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * num_deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, end = data[0]["message"], data[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"] > 0) == ([], None, True)
    assert data[2] == {"index": 0, "content_block": {"text": "", "type": "text"}, "type": "content_block_start"}
    assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == num_deltas + 1


async def test_the_client_puts_a_stream_together(serve: Serve, anthropic_client: Client) -> None:
    client = anthropic_client(await serve("hello you"))
    async with client.messages.stream(model="model", max_tokens=50, messages=ASK) as stream:
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert len(texts) > 1
    assert "".join(texts) == "hello you"
    assert message.content[0].to_dict() == {"type": "text", "text": "hello you"}
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "ending", "text"),
    [
        ({"stop_sequences": ["zzz", " you"]}, ("stop_sequence", " you"), "hello"),
        ({"stop_sequences": ["zzz"]}, ("end_turn", None), "hello you"),
        ({"max_tokens": 1}, ("max_tokens", None), "he"),
    ],
)
async def test_why_an_answer_ends_is_told(
    serve: Serve, anthropic_client: Client, stream: bool, options: Any, ending: Any, text: str
) -> None:
    client = anthropic_client(await serve("hello you"))
    asked: Any = {"model": "model", "max_tokens": 50, "messages": ASK, **options}
    if stream:
        async with client.messages.stream(**asked) as events:
            message: Any = await events.get_final_message()
    else:
        message = await client.messages.create(**asked)
    assert ((message.stop_reason, message.stop_sequence), message.content[0].text) == (ending, text)


async def test_an_answer_longer_than_the_context_ends_there_and_says_so(serve: Serve, anthropic_client: Client) -> None:
    """Clients of this API ask for the most that a model can write, whatever stands in the prompt."""
    running = await serve("go on " * 300)
    long: Any = [{"role": "user", "content": "a b " * 1900}]
    message = await anthropic_client(running).messages.create(model="model", max_tokens=8000, messages=long)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.input_tokens + message.usage.output_tokens == running.engine.info.max_model_len


async def test_parameters_reach_the_sampler(serve: Serve) -> None:
    running = await serve("x", defaults={"temperature": 0.3, "top_k": 7})
    sent = {"max_tokens": 9, "messages": ASK, "top_k": 5, "top_p": 0.5, "metadata": {"user_id": "me"}}
    reply = await running.post("/v1/messages", sent)
    assert reply.status_code == 200, reply.text
    params = running.engine.requests[0].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.3, 5, 0.5, 9)


async def test_an_assistants_last_turn_goes_on(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve(" 4")
    turns = [*ASK, {"role": "assistant", "content": "The answer is"}]
    reply = await running.post("/v1/messages", {"max_tokens": 9, "messages": turns})
    assert reply.json()["content"][0]["text"] == " 4"
    assert prompt_of(running, tokenizer).endswith("<|im_start|>assistant\nThe answer is")


@pytest.mark.parametrize("before", [[], [*ASK, {"role": "assistant", "content": "The answer is"}]])
async def test_a_user_who_says_nothing_has_a_turn(serve: Serve, tokenizer: Tokenizer, before: Any) -> None:
    running = await serve("x")
    turns = [*before, {"role": "user", "content": []}]
    assert (await running.post("/v1/messages", {"max_tokens": 9, "messages": turns})).status_code == 200
    assert prompt_of(running, tokenizer).endswith("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")


async def test_structured_output_is_a_grammar(serve: Serve) -> None:
    running = await serve("x")
    form = {"format": {"type": "json_schema", "schema": {"type": "object", "required": ["a"]}}}
    await running.post("/v1/messages", {"max_tokens": 9, "messages": ASK, "output_config": form})
    grammar = running.engine.requests[0].params.grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", form["format"]["schema"])


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"system": "Be brief."},
        {"tools": [{"name": "look", "input_schema": {"type": "object"}}]},
        {"messages": [*ASK, {"role": "assistant", "content": "The answer is"}]},
    ],
)
async def test_a_count_is_what_the_same_message_uses(serve: Serve, anthropic_client: Client, extra: Any) -> None:
    running = await serve("x")
    client = anthropic_client(running)
    asked: Any = {"model": "model", "messages": [{"role": "user", "content": ["See: ", BASE64, URL]}], **extra}
    asked["messages"][0] = {"role": "user", "content": [{"type": "text", "text": "See: "}, BASE64, URL]}
    count = await client.messages.count_tokens(**asked)
    message = await client.messages.create(**asked, max_tokens=5)
    assert count.input_tokens == message.usage.input_tokens
    assert running.loader.num_held == 0


async def test_either_header_carries_the_key(serve: Serve, anthropic_client: Client) -> None:
    running = await serve("hello", config={"api_keys": ("secret",)})
    asked: Any = {"model": "model", "max_tokens": 5, "messages": ASK}
    assert (await anthropic_client(running, "secret").messages.create(**asked)).content
    with pytest.raises(anthropic.AuthenticationError, match="x-api-key: KEY"):
        await anthropic_client(running, "wrong").messages.create(**asked)
    bearer = await running.post("/v1/messages", asked, headers={"Authorization": "Bearer secret"})
    assert bearer.status_code == 200
    chat = await running.post("/v1/chat/completions", {"messages": ASK}, headers={"x-api-key": "secret"})
    assert chat.status_code == 200


async def test_errors_have_the_form_of_the_api(serve: Serve, anthropic_client: Client) -> None:
    running = await serve(max_body_bytes=2000)
    client = anthropic_client(running)
    asked: Any = {"model": "model", "max_tokens": 5, "messages": ASK}
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.messages.create(**asked | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="temperature is -1"):
        await client.messages.create(**asked, extra_body={"temperature": -1})
    with pytest.raises(anthropic.APIStatusError) as large:
        await client.messages.create(**asked | {"system": "x" * 9000})
    running.engine.is_alive = False
    with pytest.raises(anthropic.InternalServerError) as dead:
        await client.messages.create(**asked)
    told: list[Any] = [error.value.body for error in (unknown, large, dead)]
    assert [(body["type"], body["error"]["type"]) for body in told] == [
        ("error", "not_found_error"),
        ("error", "request_too_large"),
        ("error", "api_error"),
    ]
    for reply in (await running.get("/v1/messages"), await running.post("/v1/messages/batches")):
        assert reply.json()["type"] == "error"
        assert set(reply.json()["error"]) == {"type", "message"}


async def test_a_full_server_is_overloaded_and_a_bad_picture_is_the_callers_mistake(
    serve: Serve, anthropic_client: Client
) -> None:
    full = await serve(config={"max_queued_requests": 0}, engine={"pauses_after": 0})
    running = await full.service.complete(["x"] * 8, GenerationParams())
    with pytest.raises(anthropic.APIStatusError) as refused:
        await anthropic_client(full).messages.create(model="model", max_tokens=5, messages=ASK)
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (529, "1")
    running.close()
    bad = await serve(loader=ScriptedLoader(fails={"http://host/cat.jpg": MediaError("no picture")}))
    with pytest.raises(anthropic.BadRequestError, match="no picture"):
        await anthropic_client(bad).messages.create(
            model="model", max_tokens=5, messages=[{"role": "user", "content": [URL]}]
        )


async def test_an_error_in_a_stream_is_an_event(serve: Serve, anthropic_client: Client) -> None:
    client = anthropic_client(await serve("hello you", engine={"failure": "the engine is ill", "fails_after": 1}))
    async with client.messages.stream(model="model", max_tokens=50, messages=ASK) as stream:
        with pytest.raises(anthropic.APIStatusError, match="the engine is ill"):
            await stream.get_final_message()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": []}, "messages is empty"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0] has role 'robot'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "messages[0].content[0] has type 'document'; here text, image, tool_result are known; "
            "send a document's text, or its pages as pictures",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
            "messages[0].content[0] has type 'tool_use'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": DATA_URL}]}]},
            "messages[0].content[0].source.data is a data URL; send what stands behind its comma",
        ),
        ({"messages": [{"role": "assistant", "content": [BASE64]}]}, "messages[0].content[0] has type 'image'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}
                ]
            },
            "messages[0].content[0].source has type 'file'; here base64, url are known; send the picture itself",
        ),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "does not think"),
        ({"output_config": {"effort": "max"}}, "'max'"),
        ({"container": "c"}, "container is not supported"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"nonsense": 1}, "nonsense is not a field"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(serve: Serve, fields: Any, told: str) -> None:
    running = await serve()
    reply = await running.post("/v1/messages", {"max_tokens": 5, "messages": ASK, **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert told in reply.json()["error"]["message"]


async def test_batches_are_refused_with_a_reason(serve: Serve) -> None:
    reply = await (await serve()).get("/v1/messages/batches")
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")
    assert "/v1/batches" in reply.json()["error"]["message"]
