"""Every field that OpenAI's client can send is in a column of docs/api.md, and the tables there are the code's."""

from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import typing_extensions
from openai.types import chat, completion_create_params, embedding_create_params, responses, shared_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_input_item_param as item_params
from pydantic import BaseModel

from dashinfer_vlm.frontend import conversation, parts, structured, tool_schema
from dashinfer_vlm.frontend.schema import Only, state_of
from dashinfer_vlm.server import embeddings, protocol
from dashinfer_vlm.server.responses import body as response_body
from dashinfer_vlm.server.responses import items
from tests.conftest import ROOT

TOOL = ROOT / "tools" / "field_tables.py"

PAIRS: list[tuple[type[BaseModel], Any]] = [
    (protocol.ChatBody, chat_params.CompletionCreateParams),
    (protocol.CompletionBody, completion_create_params.CompletionCreateParams),
    (embeddings.EmbeddingBody, embedding_create_params.EmbeddingCreateParams),
    (protocol.StreamOptions, chat.ChatCompletionStreamOptionsParam),
    (conversation.MessageBody, chat.ChatCompletionMessageParam),
    (conversation.ToolCallBody, chat.ChatCompletionMessageFunctionToolCallParam),
    (conversation.FunctionBody, chat.chat_completion_message_function_tool_call_param.Function),
    (parts.TextBody, chat.ChatCompletionContentPartTextParam),
    (parts.ImageUrlBody, chat.ChatCompletionContentPartImageParam),
    (parts.ImageUrl, chat.chat_completion_content_part_image_param.ImageURL),
    (tool_schema.ToolBody, chat.ChatCompletionFunctionToolParam),
    (tool_schema.FunctionToolBody, shared_params.FunctionDefinition),
    (tool_schema.ChoiceBody, chat.ChatCompletionNamedToolChoiceParam),
    (tool_schema.ChoiceBody, chat.ChatCompletionAllowedToolChoiceParam),
    (tool_schema.AllowedToolsBody, chat.ChatCompletionAllowedToolsParam),
    (structured.ResponseFormatBody, chat_params.ResponseFormat),
    (structured.JsonSchemaBody, shared_params.response_format_json_schema.JSONSchema),
    (response_body.ResponseBody, responses.response_create_params.ResponseCreateParams),
    (response_body.CountBody, responses.input_token_count_params.InputTokenCountParams),
    (response_body.ResponseToolBody, responses.FunctionToolParam),
    (response_body.ResponseChoiceBody, responses.ToolChoiceFunctionParam),
    (response_body.ResponseChoiceBody, responses.ToolChoiceAllowedParam),
    (response_body.ReasoningBody, shared_params.Reasoning),
    (response_body.TextConfigBody, responses.ResponseTextConfigParam),
    (response_body.FormatBody, responses.ResponseFormatTextJSONSchemaConfigParam),
    (response_body.ResponseStreamOptions, responses.response_create_params.StreamOptions),
    (items.MessageItemBody, responses.EasyInputMessageParam),
    (items.MessageItemBody, responses.ResponseOutputMessageParam),
    (items.CallItemBody, responses.ResponseFunctionToolCallParam),
    (items.CallOutputItemBody, item_params.FunctionCallOutput),
    (items.ReasoningItemBody, responses.ResponseReasoningItemParam),
    (items.ReferenceBody, item_params.ItemReference),
    (items.InputTextBody, responses.ResponseInputTextParam),
    (items.InputImageBody, responses.ResponseInputImageParam),
    (items.OutputTextBody, responses.ResponseOutputTextParam),
]
"""Ours, and what the client calls the same."""


def dicts(annotation: Any) -> Iterator[Any]:
    """The typed dictionaries of a union."""
    if typing_extensions.is_typeddict(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from dicts(inner)


def names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_the_tables_are_current() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run make docs\n{done.stderr}"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[ours.__name__ for ours, _ in PAIRS])
def test_every_field_of_the_client_is_in_a_column(ours: type[BaseModel], theirs: Any) -> None:
    found = list(dicts(theirs))
    assert found
    for kind in found:
        unknown = kind.__annotations__.keys() - names(ours)
        assert not unknown, f"{kind.__name__} has {sorted(unknown)}: serve them, or say that they are refused"


@pytest.mark.parametrize("part", ["input_audio", "file", "refusal"])
def test_parts_that_are_not_served_are_refused_by_their_type(shared: httpx.Client, part: str) -> None:
    messages = [{"role": "user", "content": [{"type": part, part: "x"}]}]
    error = shared.post("/v1/chat/completions", json={"messages": messages}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", "messages[0].content[0].type")


def test_every_part_of_the_client_is_served_or_tested_above() -> None:
    parts_of_client = chat.ChatCompletionContentPartParam
    kinds = {typing.get_args(typing.get_type_hints(part)["type"])[0] for part in dicts(parts_of_client)}
    assert kinds == {"text", "image_url", "input_audio", "file"}


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        ("/v1/chat/completions", protocol.ChatBody, {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", protocol.CompletionBody, {"prompt": "hi"}),
        ("/v1/responses", response_body.ResponseBody, {"input": "hi"}),
        ("/v1/responses/input_tokens", response_body.CountBody, {"input": "hi"}),
    ],
)
def test_what_stands_under_refused_is_refused_and_the_rest_of_its_row_is_not(
    shared: httpx.Client, path: str, body: type[BaseModel], asked: dict[str, Any]
) -> None:
    for name, field in body.model_fields.items():
        if state_of(field) != "refused":
            continue
        error = shared.post(path, json={**asked, name: {"some": "thing"}}).json()["error"]
        assert (error["code"], error["param"]) == ("unsupported", name)
        for value in (None, *(v for note in field.metadata if isinstance(note, Only) for v in note.neutral)):
            assert shared.post(path, json={**asked, name: value}).status_code == 200, (name, value)
