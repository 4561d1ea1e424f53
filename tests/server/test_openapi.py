"""The API's description says what the server does: every route, every field, and answers that keep to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi.routing import APIRoute

from dashinfer_vlm.server.described import operation_of
from dashinfer_vlm.server.protocol import ChatBody, CompletionBody
from tests.server.conftest import Running, Serve

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}


@pytest.fixture(scope="module")
def document(shared: httpx.Client) -> dict[str, Any]:
    reply = shared.get("/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    return dict(reply.json())


def schema(document: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    return {**told, "components": document["components"]}


def answer(document: dict[str, Any], path: str, method: str, reply: httpx.Response) -> dict[str, Any]:
    """The schema that the description has for a reply."""
    content = document["paths"][path][method]["responses"][str(reply.status_code)]["content"]
    return schema(document, content[reply.headers["content-type"]]["schema"])


async def test_every_route_but_those_of_pages_is_described(serve: Serve) -> None:
    running: Running = await serve()
    app = running.server.config.app
    routes = [route for route in app.routes if isinstance(route, APIRoute)]  # type: ignore[union-attr]
    for route in routes:
        assert (operation_of(route) is None) == (not route.include_in_schema or route.path.startswith("/page/")), route


@pytest.mark.parametrize(("name", "body"), [("ChatBody", ChatBody), ("CompletionBody", CompletionBody)])
def test_bodies_are_those_that_are_validated(document: dict[str, Any], name: str, body: Any) -> None:
    told = document["components"]["schemas"][name]
    assert told["properties"].keys() == body.model_fields.keys()
    assert told["additionalProperties"] is False


def test_what_is_not_served_may_only_be_absent(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["best_of"]["enum"] == [None, 1]
    assert fields["use_beam_search"]["enum"] == [None, False]
    assert fields["audio"]["enum"] == [None]
    assert fields["user"]["description"] == "No effect."


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(document)):
        assert name in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/responses/{id}", {"include": "array", "include_obfuscation": "boolean", "stream": [False]}),
        (
            "/v1/responses/{id}/input_items",
            {"after": "string", "include": "array", "limit": "integer", "order": ["asc", "desc"]},
        ),
    ],
)
def test_queries_are_told_without_null_which_they_cannot_say(
    document: dict[str, Any], path: str, query: dict[str, Any]
) -> None:
    parameters = [each for each in document["paths"][path]["get"]["parameters"] if each["in"] == "query"]
    told = {each["name"]: each["schema"] for each in parameters}
    assert {name: each.get("enum", each.get("type")) for name, each in told.items()} == query
    assert "null" not in json.dumps(list(told.values()))
    assert not any(each["required"] for each in parameters)


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/v1/chat/completions", "post", CHAT | {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}),
        ("/v1/chat/completions", "post", CHAT | {"prompt_logprobs": 1, "n": 2}),
        ("/v1/chat/completions", "post", {"messages": []}),
        ("/v1/chat/completions", "post", CHAT | {"model": "another"}),
        ("/v1/completions", "post", TEXT | {"logprobs": 1, "prompt_logprobs": 0, "return_token_ids": True}),
        ("/v1/completions", "post", {}),
        ("/v1/responses", "post", {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}),
        ("/v1/responses", "post", {"input": "hi", "truncation": "auto"}),
        ("/v1/responses/input_tokens", "post", {"input": "hi"}),
        ("/tokenize", "post", TEXT | {"return_token_strs": True}),
        ("/detokenize", "post", {"tokens": [1, 2]}),
        ("/v1/models", "get", None),
        ("/health", "get", None),
        ("/ready", "get", None),
        ("/version", "get", None),
    ],
)
def test_answers_have_the_form_that_is_told(
    shared: httpx.Client, document: dict[str, Any], path: str, method: str, body: Any
) -> None:
    reply = shared.request(method, path, json=body)
    jsonschema.validate(reply.json(), answer(document, path, method, reply))


def test_each_body_but_those_that_name_a_file_has_an_example_that_is_answered(
    shared: httpx.Client, document: dict[str, Any]
) -> None:
    bodies = {
        path: methods["post"]["requestBody"]["content"]["application/json"]
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    }
    assert len(bodies) == 8
    for path, told in bodies.items():
        reply = shared.post(path, json=told["example"])
        assert reply.status_code == 200, (path, reply.text)
        jsonschema.validate(reply.json(), answer(document, path, "post", reply))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}, "return_token_ids": True}),
        ("/v1/completions", TEXT | {"stream_options": {"include_usage": True}}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", CHAT | {"max_tokens": 8}),
    ],
)
def test_events_have_the_form_that_is_told(
    shared: httpx.Client, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    reply = shared.post(path, json=body | {"stream": True})
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    told = schema(document, content["text/event-stream"]["itemSchema"])
    events = [dict(line.split(": ", 1) for line in event.splitlines()) for event in reply.text.split("\n\n")[:-1]]
    assert len(events) > 3
    for event in events:
        check_event(document, told, event)


def check_event(document: dict[str, Any], told: dict[str, Any], event: dict[str, str]) -> None:
    """The fields are texts; what is told of the text of `data` is looked at apart, as validators do not."""
    jsonschema.validate(event, told)
    data = told["properties"]["data"]
    if event["data"] != "[DONE]":
        held = next(each["contentSchema"] for each in (data, *data.get("anyOf", ())) if "contentSchema" in each)
        jsonschema.validate(json.loads(event["data"]), schema(document, held))


def test_streams_without_names_end_with_done_and_others_name_each_event(document: dict[str, Any]) -> None:
    def told(path: str) -> dict[str, Any]:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        return dict(content["text/event-stream"]["itemSchema"])

    assert {"const": "[DONE]"} in told("/v1/chat/completions")["properties"]["data"]["anyOf"]
    assert told("/v1/responses")["required"] == ["event", "data"]


async def test_a_form_is_told_with_its_file(serve: Serve, tmp_path: Path) -> None:
    running: Running = await serve(config={"files_path": str(tmp_path)})
    document = (await running.get("/openapi.json")).json()
    form = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]
    fields = document["components"]["schemas"]["UploadForm"]
    assert form["schema"] == {"$ref": "#/components/schemas/UploadForm"}
    assert form["encoding"] == {"expires_after": {"style": "deepObject", "explode": True}}
    assert fields["required"] == ["file", "purpose"]
    assert fields["properties"]["file"] == {"type": "string", "contentMediaType": "application/octet-stream"}
    assert fields["properties"]["expires_after"]["$ref"] == "#/components/schemas/ExpiryBody"
    assert "default" not in fields["properties"]["expires_after"]
    assert "multipart/form-data" in (await running.get("/docs")).text


async def test_the_page_needs_no_script_and_no_other_host(serve: Serve) -> None:
    running: Running = await serve()
    reply = await running.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"<script|https?://|src=", reply.text)
    assert "POST /v1/chat/completions" in reply.text
    targets = set(re.findall(r'href="#(\w+)"', reply.text))
    assert targets <= set(re.findall(r'id="(\w+)"', reply.text))


async def test_with_keys_the_description_is_open_and_says_that_a_key_is_wanted(serve: Serve) -> None:
    running: Running = await serve(config={"api_keys": ("secret",)})
    told = (await running.get("/openapi.json")).json()
    chat = told["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert ("401" in chat["responses"], "403" in chat["responses"]) == (True, False)
    assert told["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    assert (await running.get("/docs")).status_code == 200
    assert (await running.get("/v1/models")).status_code == 401


async def test_no_docs_turns_both_off(serve: Serve) -> None:
    running: Running = await serve(config={"docs": False})
    for path in ("/openapi.json", "/docs"):
        assert (await running.get(path)).status_code == 404
