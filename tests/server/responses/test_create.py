"""Responses through the OpenAI client, over a real socket and a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.server.conftest import Parts, Serve
from tests.server.responses.conftest import prompt_of
from tests.server.test_reasoning import THOUGHT

Client = Callable[..., AsyncOpenAI]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CITY: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": CITY, "strict": False}
PICTURE = "http://host/one.jpg"
LOOK: Any = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
        ],
    }
]


async def test_a_text_is_answered(serve: Serve, openai_client: Client, tokenizer: Tokenizer) -> None:
    running = await serve("They differ.", engine={"num_cached_tokens": 16})
    response = await openai_client(running).responses.create(
        model="model", input="Do they differ?", instructions="Be brief.", max_output_tokens=100, temperature=0.1
    )
    assert (response.status, response.output_text, response.model) == ("completed", "They differ.", "models/scripted")
    assert response.output[0].type == "message"
    assert (response.instructions, response.max_output_tokens, response.temperature) == ("Be brief.", 100, 0.1)
    assert response.usage is not None
    num_prompt = len(running.engine.requests[0].prompt_ids)
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (num_prompt, 16)
    assert response.usage.total_tokens == num_prompt + response.usage.output_tokens
    assert prompt_of(running, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDo they differ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert running.engine.requests[0].params.max_tokens == 100


async def test_a_picture_is_looked_at(serve: Serve, openai_client: Client) -> None:
    running = await serve("A dog.")
    response = await openai_client(running).responses.create(model="model", input=LOOK)
    assert response.output_text == "A dog."
    assert [item.content_hash.strip() for item in running.engine.requests[0].items] == [PICTURE.encode()]
    assert running.loader.num_held == 0


async def test_low_detail_and_chats_own_parts_are_understood(serve: Serve) -> None:
    running = await serve("A dog.")
    content = [
        {"type": "input_image", "image_url": PICTURE, "detail": "low"},
        {"type": "video_url", "video_url": {"url": "http://host/film.mp4", "fps": 1}},
    ]
    reply = await running.post("/v1/responses", {"input": [{"role": "user", "content": content}]})
    assert reply.status_code == 200, reply.text
    assert [(ref.kind, ref.max_pixels, ref.fps) for ref in running.loader.loaded] == [
        ("image", 512 * 512, None),
        ("video", None, 1),
    ]


async def test_an_answer_that_the_limit_cuts_is_incomplete(serve: Serve, openai_client: Client) -> None:
    response = await openai_client(await serve("one two three four")).responses.create(
        model="model", input="count", max_output_tokens=2
    )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]


async def test_a_call_that_the_limit_cuts_is_incomplete_and_cannot_be_gone_on_with(
    serve: Serve, openai_client: Client, tokenizer: Tokenizer
) -> None:
    client = openai_client(await serve(CALL))
    limit = len(tokenizer.encode_text(CALL[: CALL.index("Paris")]))
    first = await client.responses.create(model="model", input="look", tools=[WEATHER], max_output_tokens=limit)
    assert (first.status, first.output_text) == ("incomplete", "")
    call: Any = first.output[0]
    assert (call.type, call.name, call.status) == ("function_call", "weather", "incomplete")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    with pytest.raises(openai.BadRequestError, match="max_output_tokens has cut") as caught:
        await client.responses.create(model="model", previous_response_id=first.id, input=[result], tools=[WEATHER])
    assert caught.value.param == "previous_response_id"


async def test_an_answer_without_a_word_is_an_empty_text(serve: Serve, openai_client: Client) -> None:
    response = await openai_client(await serve("")).responses.create(model="model", input="say nothing")
    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == ""


class Sight(BaseModel):
    shape: str
    colour: str


async def test_an_answer_is_parsed(serve: Serve, openai_client: Client) -> None:
    running = await serve('{"shape": "circle", "colour": "red"}')
    response = await openai_client(running).responses.parse(model="model", input="look", text_format=Sight)
    assert response.output_parsed == Sight(shape="circle", colour="red")
    grammar = running.engine.requests[0].params.grammar
    assert (grammar.kind, grammar.param) == ("json_schema", "text.format")
    assert json.loads(grammar.text)["required"] == ["shape", "colour"]


async def test_a_tool_is_called_and_its_result_is_read(
    serve: Serve, openai_client: Client, tokenizer: Tokenizer
) -> None:
    running = await serve("I ask.\n" + CALL)
    client = openai_client(running)
    first = await client.responses.create(model="model", input="Weather in Paris?", tools=[WEATHER])
    assert [item.type for item in first.output] == ["message", "function_call"]
    call: Any = first.output[1]
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Paris"}, "completed")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    turns: Any = [{"role": "user", "content": "Weather in Paris?"}, *[item.to_dict() for item in first.output], result]
    await client.responses.create(model="model", input=turns, tools=[WEATHER], store=False)
    by_hand = prompt_of(running, tokenizer)
    await client.responses.create(model="model", previous_response_id=first.id, input=[result], tools=[WEATHER])
    assert prompt_of(running, tokenizer) == by_hand
    assert by_hand.endswith(
        f"<|im_start|>assistant\nI ask.\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nSunny.\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "time"]),
        ({"type": "function", "name": "time"}, ["time"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}, ["time"]),
    ],
)
async def test_a_call_that_must_be_is_a_grammar_s_work(serve: Serve, choice: Any, names: list[str]) -> None:
    running = await serve(CALL)
    tools = [WEATHER, {"type": "function", "name": "time", "parameters": None, "strict": False}]
    reply = await running.post("/v1/responses", {"input": "x", "tools": tools, "tool_choice": choice})
    assert reply.status_code == 200, reply.text
    told = json.loads(running.engine.requests[0].params.grammar.text)
    assert [json.loads(form["head"].split(":")[1].split(",")[0]) for form in told["forms"]] == names
    assert not told["free"]
    assert reply.json()["tool_choice"] == choice


async def test_tools_are_strict_unless_they_say_otherwise(serve: Serve) -> None:
    running = await serve(CALL)
    free = {key: value for key, value in WEATHER.items() if key != "strict"}
    reply = await running.post("/v1/responses", {"input": "x", "tools": [free]})
    assert reply.json()["tools"][0]["strict"] is True
    assert json.loads(running.engine.requests[0].params.grammar.text)["forms"][0]["schema"] == CITY
    await running.post("/v1/responses", {"input": "x", "tools": [WEATHER]})
    assert running.engine.requests[1].params.grammar is None


async def test_reasoning_is_an_item_of_its_own_and_goes_back_to_the_model(
    thinking: Parts, openai_client: Client, tokenizer: Tokenizer
) -> None:
    async with thinking.running(THOUGHT) as running:
        client = openai_client(running)
        first = await client.responses.create(model="model", input="Is it?")
        reasoning: Any = first.output[0]
        assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "hm, so\n\nyes")
        assert first.output_text == "It is.\n"
        assert first.usage is not None
        assert first.usage.output_tokens_details.reasoning_tokens > 0
        await client.responses.create(model="model", input="Sure?", previous_response_id=first.id)
        assert "assistant: <think>hm, so\n\nyes</think>It is.\n\nuser: Sure?" in prompt_of(running, tokenizer)


async def test_log_probabilities_are_told_where_they_are_asked_for(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve("qz"))
    response = await client.responses.create(
        model="model", input="x", include=["message.output_text.logprobs"], top_logprobs=2
    )
    message: Any = response.output[0]
    part = message.content[0]
    assert [row.token for row in part.logprobs] == ["q", "z"]
    assert [len(row.top_logprobs) for row in part.logprobs] == [2, 2]


async def test_tokens_of_an_input_are_counted(serve: Serve, openai_client: Client) -> None:
    running = await serve()
    client = openai_client(running)
    await client.responses.create(model="model", input=LOOK)
    counted = await client.responses.input_tokens.count(model="model", input=LOOK)
    assert counted.input_tokens == len(running.engine.requests[0].prompt_ids)


REFUSED: Any = [
    ({"input": []}, "input", "invalid_value"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "unsupported"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        "input[0].content[0].type",
        "unsupported",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x", "file_id": "y"}]}]},
        "input[0].content[0].file_id",
        "unsupported",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "y"}]}]},
        "input[0].content[0].file_id",
        "unsupported",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": None}]}]},
        "input[0].content[0].image_url",
        "invalid_value",
    ),
    (
        {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": PICTURE}]}]},
        "input[0].content",
        "invalid_value",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "unsupported"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "invalid_value"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported"),
    ({"truncation": "auto"}, "truncation", "unsupported"),
    ({"conversation": "conv_1"}, "conversation", "unsupported"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported"),
    ({"background": True, "stream": True}, "stream", "unsupported"),
    ({"background": True, "store": False}, "background", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_value"),
    ({"nonsense": 1}, "nonsense", "unsupported"),
    ({"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
]


@pytest.mark.parametrize(("body", "param", "code"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
async def test_what_cannot_be_is_refused_by_name(serve: Serve, body: Any, param: str, code: str) -> None:
    reply = await (await serve()).post("/v1/responses", {"input": "x"} | body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"background": True, "stream": True}, "leave stream out and poll GET /v1/responses/{id}"),
        ({"truncation": "auto"}, "leave it out"),
        ({"tools": [{"type": "mcp"}]}, "tools[0] has type 'mcp'; this server has function tools only"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "send a document's text, or its pages as pictures",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "input[0].content[0] names a file; send the picture as image_url",
        ),
    ],
)
async def test_a_refusal_says_what_to_do(serve: Serve, body: Any, told: str) -> None:
    reply = await (await serve()).post("/v1/responses", {"input": "x"} | body)
    assert told in reply.json()["error"]["message"]


async def test_a_prompt_that_does_not_fit_is_told_by_its_own_names(serve: Serve, openai_client: Client) -> None:
    client = openai_client(await serve())
    with pytest.raises(openai.BadRequestError, match="lower max_output_tokens to at most") as caught:
        await client.responses.create(model="model", input="x", max_output_tokens=5000)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
