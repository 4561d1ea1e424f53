"""Tools through the OpenAI client, over a real socket and a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.server.conftest import Running, Serve

Client = Callable[..., AsyncOpenAI]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
TWO = f"I ask both.\n{CALL}\n" + '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def prompt_of(running: Running, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(running.engine.requests[-1].prompt_ids, skip_special=False)


async def test_calls_are_told_apart_from_text(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve(TWO))
    choice = (await client.chat.completions.create(model="model", messages=ASK, tools=TOOLS)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I ask both.")
    calls: Any = choice.message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("weather", '{"city": "Paris"}'),
        ("time", "{}"),
    ]
    assert len({call.id for call in calls}) == 2


async def test_calls_alone_have_no_content(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve(CALL))
    message = (await client.chat.completions.create(model="model", messages=ASK, tools=TOOLS)).choices[0].message
    assert message.content is None
    assert message.tool_calls is not None


async def test_a_stream_tells_the_same_calls_with_ids_of_their_own_in_every_choice(
    serve: Serve, openai_client: Client
) -> None:
    client = openai_client(await serve(TWO))
    async with client.chat.completions.stream(model="model", messages=ASK, tools=TOOLS, n=3, logprobs=True) as stream:
        async for _ in stream:
            pass
        whole = await stream.get_final_completion()
    ids = set()
    for choice in whole.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I ask both.")
        calls: Any = choice.message.tool_calls
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
            ("weather", {"city": "Paris"}),
            ("time", {}),
        ]
        ids |= {call.id for call in calls}
        assert choice.logprobs is not None
        assert choice.logprobs.content
    assert len(ids) == 6


async def test_an_event_has_one_entry_for_a_call(serve: Serve, openai_client: Client) -> None:
    """OpenAI's client takes two entries of its first event for two calls."""
    client = openai_client(await serve(TWO))
    stream = await client.chat.completions.create(model="model", messages=ASK, tools=TOOLS, stream=True)
    numbers = [[call.index for call in chunk.choices[0].delta.tool_calls or ()] async for chunk in stream]
    assert any(numbers)
    assert all(len(set(told)) == len(told) for told in numbers)


async def test_what_the_client_has_parsed_may_be_sent_back(serve: Serve, openai_client: Client) -> None:
    class Weather(BaseModel):
        city: str

    client = openai_client(await serve(CALL)).chat.completions
    tool = openai.pydantic_function_tool(Weather, name="weather")
    said: Any = (await client.parse(model="model", messages=ASK, tools=[tool])).choices[0].message
    assert said.tool_calls[0].function.parsed_arguments == Weather(city="Paris")
    result: Any = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}
    assert await client.create(model="model", messages=[*ASK, said, result])


async def test_a_malformed_call_is_text(serve: Serve, openai_client: Client) -> None:
    text = CALL.replace("}}", "}")
    client = openai_client(await serve(text))
    choice = (await client.chat.completions.create(model="model", messages=ASK, tools=TOOLS)).choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", text, None)


@pytest.mark.parametrize(("end", "arguments"), [("Paris", '{"city": "'), ("weather", None)])
@pytest.mark.parametrize("stop", [False, True])
async def test_a_call_that_is_cut_is_told_as_far_as_it_came_and_never_as_text(
    serve: Serve, openai_client: Client, tokenizer: Tokenizer, end: str, arguments: str | None, stop: bool
) -> None:
    text = f"I ask.\n{CALL}"
    client = openai_client(await serve(text))
    limit: Any = {"stop": end} if stop else {"max_tokens": len(tokenizer.encode_text(text[: text.index(end)]))}
    choice = (await client.chat.completions.create(model="model", messages=ASK, tools=TOOLS, **limit)).choices[0]
    calls: Any = choice.message.tool_calls or []
    assert choice.finish_reason == ("stop" if stop else "length")
    assert choice.message.content == "I ask."
    assert [call.function.name for call in calls] == ([] if arguments is None else ["weather"])
    assert all(call.function.arguments == arguments for call in calls)


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
async def test_without_tools_to_call_everything_is_text(
    serve: Serve, openai_client: Client, tokenizer: Tokenizer, options: Any
) -> None:
    running = await serve(CALL)
    choice = (await openai_client(running).chat.completions.create(model="model", messages=ASK, **options)).choices[0]
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
    assert "<tools>" not in prompt_of(running, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_ends_the_answer_where_calls_are_not_parallel(serve: Serve, stream: bool) -> None:
    running = await serve(TWO + " and so on " * 50)
    body = {"messages": ASK, "tools": TOOLS, "parallel_tool_calls": False, "stream": stream}
    reply = await running.post("/v1/chat/completions", body)
    assert reply.text.count('"name":"weather"') == 1
    assert '"name":"time"' not in reply.text
    assert '"finish_reason":"tool_calls"' in reply.text
    await running.engine.idle.wait()
    assert len(running.engine.aborted) == 1


@pytest.mark.parametrize(
    ("choice", "names", "parallel"),
    [
        ("required", ["weather", "time"], True),
        ({"type": "function", "function": {"name": "time"}}, ["time"], False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]},
            },
            ["time"],
            True,
        ),
    ],
)
async def test_a_call_that_must_be_is_a_grammar_s_work(
    serve: Serve, choice: Any, names: list[str], parallel: bool
) -> None:
    running = await serve(CALL)
    reply = await running.post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS, "tool_choice": choice})
    assert reply.status_code == 200, reply.text
    grammar = running.engine.requests[0].params.grammar
    assert (grammar.kind, grammar.param, grammar.thought) == ("calls", "tools", None)
    told = json.loads(grammar.text)
    assert [json.loads(form["head"].split(":")[1].split(",")[0]) for form in told["forms"]] == names
    assert (told["parallel"], told["free"]) == (parallel, False)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_was_named_ends_as_any_answer_does(serve: Serve, stream: bool) -> None:
    running = await serve(CALL)
    named = {"type": "function", "function": {"name": "weather"}}
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": named, "stream": stream}
    reply = await running.post("/v1/chat/completions", body)
    assert '"name":"weather"' in reply.text
    assert '"finish_reason":"stop"' in reply.text
    required = await running.post("/v1/chat/completions", body | {"tool_choice": "required"})
    assert '"finish_reason":"tool_calls"' in required.text


@pytest.mark.parametrize(
    ("said", "text", "called"), [(CALL, None, True), ('{"city": "Rome"}', '{"city": "Rome"}', False)]
)
async def test_an_answer_beside_tools_has_its_form_or_is_calls(
    serve: Serve, said: str, text: str | None, called: bool
) -> None:
    running = await serve(said)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    reply = await running.post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS, "response_format": form})
    message = reply.json()["choices"][0]["message"]
    assert (message["content"], "tool_calls" in message) == (text, called)
    grammar = running.engine.requests[0].params.grammar
    told = json.loads(grammar.text)
    assert (grammar.kind, grammar.param, told["free"]) == ("calls", "response_format", False)
    assert json.loads(told["content"][1]) == CITY
    must = {"messages": ASK, "tools": TOOLS, "response_format": form, "tool_choice": "required"}
    await running.post("/v1/chat/completions", must)
    assert json.loads(running.engine.requests[1].params.grammar.text)["content"] is None


async def test_arguments_beside_a_form_are_streamed_as_they_are_written(serve: Serve) -> None:
    running = await serve(CALL)
    form = {"type": "json_object"}
    body = {"messages": ASK, "tools": TOOLS, "response_format": form, "stream": True}
    reply = await running.post("/v1/chat/completions", body)
    assert reply.text.count('"arguments"') > 3


async def test_strict_tools_are_held_to_their_schema_when_the_model_calls_them_by_itself(serve: Serve) -> None:
    running = await serve(CALL)
    strict = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
    await running.post("/v1/chat/completions", {"messages": ASK, "tools": [strict, TOOLS[1]]})
    told = json.loads(running.engine.requests[0].params.grammar.text)
    assert told["free"]
    assert [form["schema"] for form in told["forms"]] == [CITY, {"type": "object"}]
    await running.post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS})
    assert running.engine.requests[1].params.grammar is None


async def test_the_model_is_shown_tools_calls_and_results_with_pictures(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve("Sunny.")
    picture = {"type": "image_url", "image_url": {"url": "http://host/sky.jpg"}}
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [called, {**called, "id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "The sky: "}, picture]},
        {"role": "tool", "tool_call_id": "call_2", "content": "20 degrees"},
    ]
    reply = await running.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    assert reply.status_code == 200, reply.text
    pads = "<|image_pad|>" * running.loader.num_tokens
    assert prompt_of(running, tokenizer) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"  # noqa: E501
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{json.dumps(TOOLS[0])}\n"
        '{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}\n{CALL}<|im_end|>\n<|im_start|>user\n"
        f"<tool_response>\nThe sky: <|vision_start|>{pads}<|vision_end|>\n</tool_response>\n"
        "<tool_response>\n20 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
        {"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}},
        {
            "tools": TOOLS,
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "mcp"}]}},
        },
    ],
)
async def test_tools_that_others_run_are_not_served(serve: Serve, openai_client: Client, fields: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="this server has function tools only") as refusal:
        await openai_client(await serve("x")).chat.completions.create(model="model", messages=ASK, extra_body=fields)
    assert refusal.value.code == "unsupported"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ],
)
async def test_what_cannot_be_meant_is_refused(serve: Serve, openai_client: Client, fields: Any, param: str) -> None:
    running = await serve("x")
    with pytest.raises(openai.BadRequestError) as refusal:
        await openai_client(running).chat.completions.create(model="model", messages=ASK, extra_body=fields)
    assert refusal.value.param == param
    assert running.loader.num_held == 0
