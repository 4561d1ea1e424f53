"""Tools and thoughts in Anthropic's form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.server.anthropic import writer
from tests.server.anthropic.conftest import Client
from tests.server.conftest import Parts, Running, Serve
from tests.server.test_reasoning import ALWAYS, HYBRID, THOUGHT

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"name": "weather", "description": "Of a city.", "input_schema": CITY},
    {"name": "time", "input_schema": {"type": "object"}, "type": "custom"},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f"I ask both.\n{CALL}\n" + '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def same_blocks(content: list[Any]) -> None:
    text, weather, time = content
    assert text.to_dict() == {"type": "text", "text": "I ask both."}
    assert (weather.type, weather.name, weather.input) == ("tool_use", "weather", {"city": "Paris"})
    assert (time.type, time.name, time.input) == ("tool_use", "time", {})
    assert weather.id.startswith("toolu_")
    assert weather.id != time.id


async def test_calls_are_blocks_of_their_own(serve: Serve, anthropic_client: Client) -> None:
    client = anthropic_client(await serve(TWO))
    message = await client.messages.create(model="model", max_tokens=200, messages=ASK, tools=TOOLS)
    assert message.stop_reason == "tool_use"
    same_blocks(message.content)


async def test_a_stream_tells_the_same_calls(serve: Serve, anthropic_client: Client) -> None:
    client = anthropic_client(await serve(TWO))
    kinds: list[str] = []
    async with client.messages.stream(model="model", max_tokens=200, messages=ASK, tools=TOOLS) as stream:
        async for event in stream:
            if event.type == "content_block_delta":
                kinds.append(event.delta.type)
        message = await stream.get_final_message()
    same_blocks(message.content)
    assert message.stop_reason == "tool_use"
    assert dict.fromkeys(kinds) == {"text_delta": None, "input_json_delta": None}


async def test_a_stream_that_holds_a_call_back_is_kept_alive(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_QUIET_S", 0.0)
    running = await serve(CALL)
    reply = await running.post("/v1/messages", {"max_tokens": 200, "messages": ASK, "tools": TOOLS, "stream": True})
    assert reply.text.count("event: ping") > 2
    assert reply.text.index("event: content_block_start") > reply.text.rindex("event: ping")


async def test_a_call_that_the_limit_cuts_is_left_out(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve(CALL)
    num_tokens = len(tokenizer.encode_text(CALL[: CALL.index("Paris")]))
    asked = {"max_tokens": num_tokens, "messages": ASK, "tools": TOOLS, "tool_choice": {"type": "any"}}
    reply = (await running.post("/v1/messages", asked)).json()
    assert (reply["stop_reason"], reply["content"]) == ("max_tokens", [])


@pytest.mark.parametrize(
    ("choice", "names", "parallel"),
    [
        ({"type": "any"}, ["weather", "time"], True),
        ({"type": "any", "disable_parallel_tool_use": True}, ["weather", "time"], False),
        ({"type": "tool", "name": "time"}, ["time"], False),
    ],
)
async def test_a_call_that_must_be_is_a_grammar_s_work(
    serve: Serve, choice: Any, names: list[str], parallel: bool
) -> None:
    running = await serve(CALL)
    asked = {"max_tokens": 99, "messages": ASK, "tools": TOOLS, "tool_choice": choice}
    reply = await running.post("/v1/messages", asked)
    assert reply.status_code == 200, reply.text
    told = json.loads(running.engine.requests[0].params.grammar.text)
    assert [json.loads(form["head"].split(":")[1].split(",")[0]) for form in told["forms"]] == names
    assert (told["parallel"], told["free"]) == (parallel, False)


async def test_tools_are_not_shown_where_none_may_be_called(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve(CALL)
    asked = {"max_tokens": 99, "messages": ASK, "tools": TOOLS, "tool_choice": {"type": "none"}}
    reply = (await running.post("/v1/messages", asked)).json()
    assert reply["content"] == [{"text": CALL, "type": "text"}]
    assert "<tools>" not in tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False)


async def test_results_reach_the_model_as_they_would_from_chat(serve: Serve) -> None:
    running = await serve("Sunny.")
    picture = {"type": "image", "source": {"type": "url", "url": "http://host/sky.jpg"}}
    turns = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "The sky: "}, picture],
                },
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no clock", "is_error": True},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    reply = await running.post("/v1/messages", {"max_tokens": 9, "messages": turns, "tools": TOOLS})
    assert reply.status_code == 200, reply.text
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    calls = [
        {"id": "toolu_1", "type": "function", "function": function},
        {"id": "toolu_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    chat = [
        *ASK,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {
            "role": "tool",
            "tool_call_id": "toolu_1",
            "content": ["The sky: ", {"type": "image_url", "image_url": {"url": "http://host/sky.jpg"}}],
        },
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no clock"},
        {"role": "user", "content": "Well?"},
    ]
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
        {"type": "function", "function": {"name": "time"}},
    ]
    await running.post("/v1/chat/completions", {"messages": chat, "tools": tools})
    ours, theirs = running.engine.requests
    assert ours.prompt_ids == theirs.prompt_ids


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0] has type 'bash_20250124'"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name is 'a b'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two of the same name"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice has a name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "fly"}}, "'fly', which is no tool"),
        (
            {
                "messages": [
                    *ASK,
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "time", "input": {}}]},
                ]
            },
            "its tool_result is missing",
        ),
    ],
)
async def test_what_cannot_be_meant_is_refused(serve: Serve, fields: Any, told: str) -> None:
    running = await serve()
    reply = await running.post("/v1/messages", {"max_tokens": 5, "messages": ASK, **fields})
    assert reply.status_code == 400, reply.text
    assert told in reply.json()["error"]["message"]


@pytest.fixture
async def think(tokenizer: Tokenizer) -> AsyncIterator[Serve]:
    """`await think(source, text)` starts a server of a model with this template that says this text."""
    async with AsyncExitStack() as stack:

        async def start(source: str, text: str, **options: Any) -> Running:
            parts = Parts(tokenizer, ChatTemplate(source, tokenizer))
            return await stack.enter_async_context(parts.running(text, **options))

        yield start


async def test_thoughts_are_blocks_of_their_own(think: Serve, anthropic_client: Client) -> None:
    client = anthropic_client(await think(ALWAYS, THOUGHT))
    asked: Any = {"model": "model", "max_tokens": 200, "messages": ASK}
    message = await client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 100})
    async with client.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    answers: tuple[Any, Any] = (message.content, streamed.content)
    for thought, text in answers:
        assert (thought.type, thought.thinking) == ("thinking", "hm, so\n\nyes")
        assert thought.signature
        assert (text.type, text.text) == ("text", "It is.\n")
    assert message.usage.output_tokens_details.thinking_tokens > 0
    quiet = await client.messages.create(**asked, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in quiet.content] == ["text"]


@pytest.mark.parametrize(("kind", "end"), [("disabled", "</think>\n\n"), ("adaptive", "A:"), ("enabled", "A:")])
async def test_a_model_that_may_think_is_told_whether_to(
    think: Serve, tokenizer: Tokenizer, kind: str, end: str
) -> None:
    running = await think(HYBRID, "It is.")
    await running.post("/v1/messages", {"max_tokens": 50, "messages": ASK, "thinking": {"type": kind}})
    assert tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False).endswith(end)


async def test_a_model_that_always_thinks_cannot_be_told_not_to(think: Serve) -> None:
    running = await think("{{ messages[0].content }}<think>\n", THOUGHT)
    reply = await running.post("/v1/messages", {"max_tokens": 50, "messages": ASK, "thinking": {"type": "disabled"}})
    assert (reply.status_code, "always thinks" in reply.text) == (400, True)


async def test_earlier_thoughts_reach_the_template(think: Serve, tokenizer: Tokenizer) -> None:
    running = await think(HYBRID, "x")
    said = [{"type": "thinking", "thinking": "hm", "signature": "unsigned"}, {"type": "text", "text": "It is."}]
    turns = [*ASK, {"role": "assistant", "content": said}, *ASK]
    await running.post("/v1/messages", {"max_tokens": 9, "messages": turns})
    prompt = tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False)
    assert "assistant: <think>hm</think>It is." in prompt
