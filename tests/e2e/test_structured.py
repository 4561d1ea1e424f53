"""Structured output over HTTP, asked as the OpenAI client asks, of a real server with a random model."""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from tests.e2e.serving import Server

ASK: Any = [{"role": "user", "content": "Describe it."}]


class Thing(BaseModel):
    shape: Literal["circle", "square"]
    corners: int = Field(ge=0, le=99)
    colours: list[Literal["red", "blue"]] = Field(max_length=2)


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def test_parse_gives_objects_of_the_class(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="model", messages=ASK, response_format=Thing, n=4, temperature=2, max_completion_tokens=1500
    )
    things = [choice.message.parsed for choice in reply.choices]
    assert all(isinstance(thing, Thing) for thing in things)
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}


def test_a_stream_of_json(client: OpenAI) -> None:
    with client.chat.completions.stream(model="model", messages=ASK, response_format=Thing, seed=3) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Thing)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_is_not_supported_is_a_status_before_anything_else(client: OpenAI, stream: bool) -> None:
    schema = {"type": "array", "items": {}, "uniqueItems": True}
    form: Any = {"type": "json_schema", "json_schema": {"name": "set", "schema": schema, "strict": True}}
    with pytest.raises(BadRequestError) as refusal:
        client.chat.completions.create(model="model", messages=ASK, response_format=form, stream=stream)
    assert refusal.value.code == "unsupported"
    assert refusal.value.param == "response_format"
    assert 'Unimplemented keys: ["uniqueItems"]' in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, {"yes!", "no!"}),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
        ({"guided_json": {"enum": ["yes", "no"]}}, {'"yes"', '"no"'}),
    ],
)
def test_the_names_of_vllm_work_in_chats_and_in_texts(
    server: Server, fields: dict[str, Any], answers: set[str]
) -> None:
    chat = {"messages": ASK, "max_tokens": 50, **fields}
    text = {"prompt": "Yes or no?", **fields}
    with httpx.Client(base_url=f"{server.address}/v1", timeout=60) as http:
        assert http.post("/chat/completions", json=chat).json()["choices"][0]["message"]["content"] in answers
        assert http.post("/completions", json=text).json()["choices"][0]["text"] in answers


def test_a_request_that_allows_no_token_is_told_that_it_cannot_be(client: OpenAI) -> None:
    """Clients send what a server has failed with again."""
    extra = {"structured_outputs": {"regex": "[ab]+"}, "bad_words": ["a", "b"], "allowed_token_ids": [0]}
    with pytest.raises(BadRequestError, match="forbid every token"):
        client.chat.completions.create(model="model", messages=ASK, extra_body=extra, max_completion_tokens=9)


def test_a_grammar_that_blows_up_costs_its_sender_alone(server: Server) -> None:
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**links, "d1000": {"type": "null"}}}
    with httpx.Client(base_url=f"{server.address}/v1", timeout=60) as http:
        refused = http.post("/chat/completions", json={"messages": ASK, "guided_json": schema})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_json")
        answered = http.post("/chat/completions", json={"messages": ASK, "guided_json": {"type": "boolean"}})
        assert json.loads(answered.json()["choices"][0]["message"]["content"]) in (True, False)
