"""Calls that a grammar forces out of a random model, asked as the OpenAI client asks, of a real server."""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from tests.e2e.serving import Server

ASK: Any = [{"role": "user", "content": "Move it."}]


class Move(BaseModel):
    """Move a shape."""

    shape: Literal["circle", "square"]
    by: int = Field(ge=0, le=99)


class Stop(BaseModel):
    """Stop moving."""


TOOLS: Any = [pydantic_function_tool(Move, name="move"), pydantic_function_tool(Stop, name="stop")]
MOVE: Any = {"type": "function", "function": {"name": "move"}}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def test_a_named_tool_is_called_with_arguments_of_its_schema(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="model", messages=ASK, tools=TOOLS, tool_choice=MOVE, n=4, temperature=2, max_completion_tokens=600
    )
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}, "so it is for a tool that was named"
    calls = [call for choice in reply.choices for call in choice.message.tool_calls or []]
    assert all(isinstance(call.function.parsed_arguments, Move) for call in calls)
    assert len({call.id for call in calls}) == len(calls) == 4
    assert {choice.message.content for choice in reply.choices} == {None}


def test_an_answer_that_must_call_streams_its_arguments(client: OpenAI) -> None:
    fields: Any = {"messages": ASK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(model="model", seed=5, max_completion_tokens=300, **fields)
    with client.chat.completions.stream(model="model", seed=5, max_completion_tokens=300, **fields) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        told = stream.get_final_completion().choices[0]
    expected: Any = whole.choices[0].message.tool_calls
    calls: Any = told.message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        (c.function.name, c.function.arguments) for c in expected
    ]
    assert told.finish_reason == "tool_calls"
    assert calls[0].function.name == "stop" or len(pieces) > 3
    assert isinstance(json.loads(calls[0].function.arguments), dict)


def test_a_model_that_may_call_strict_tools_goes_on_as_it_likes(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="model", messages=ASK, tools=TOOLS, max_completion_tokens=20)
    assert reply.choices[0].finish_reason in ("length", "stop", "tool_calls")
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0


@pytest.mark.parametrize("schema", [{}, {"properties": {"a": {"const": 1}}}, {"type": ["object", "string"]}])
def test_arguments_are_an_object_also_where_the_schema_does_not_say_so(
    server: Server, client: OpenAI, schema: Any
) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {**schema, "additionalProperties": False}}}
    (quote,) = httpx.post(f"{server.address}/tokenize", json={"prompt": '"'}).json()["tokens"]
    fields: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    reply = client.chat.completions.create(
        model="model", messages=ASK, max_completion_tokens=300, logit_bias={quote: 100}, **fields
    )
    calls: Any = reply.choices[0].message.tool_calls
    assert [type(json.loads(call.function.arguments)) for call in calls] == [dict], "a text was likelier"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_of_something_else_is_refused(client: OpenAI, stream: bool) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    with pytest.raises(openai.BadRequestError, match="incompatible types"):
        client.chat.completions.create(
            model="model", messages=ASK, tools=[tool], tool_choice="required", stream=stream, max_completion_tokens=20
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_kept_is_a_status(client: OpenAI, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    fields: Any = {"messages": ASK, "tools": [tool], "tool_choice": "required", "max_completion_tokens": 20}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="model", stream=stream, **fields)
    assert (refusal.value.code, refusal.value.param) == ("unsupported", "tools")
    assert "uniqueItems" in str(refusal.value)
