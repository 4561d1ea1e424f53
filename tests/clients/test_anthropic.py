"""anthropic's own client: messages with a picture, tools, streams, output by a schema, counted tokens."""

from __future__ import annotations

import base64
import json
from typing import Any

import anthropic
import pytest

from conftest import MODEL, QUESTION, URL, Place, Seen

pytestmark = pytest.mark.clients

TOOL: Any = {"name": "weather", "description": "The weather of a city.", "input_schema": Place.model_json_schema()}


@pytest.fixture
def client() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=URL, api_key="EMPTY", max_retries=0)


@pytest.fixture
def ask(png: bytes) -> list[Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png).decode()}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]}]


def test_a_message_with_a_picture_is_answered_and_its_tokens_are_those_that_were_counted(
    client: anthropic.Anthropic, ask: list[Any]
) -> None:
    message = client.messages.create(model=MODEL, messages=ask, system="Be brief.", max_tokens=8)
    counted = client.messages.count_tokens(model=MODEL, messages=ask, system="Be brief.")
    usage = message.usage
    assert (message.content[0].type, message.stop_reason) == ("text", "max_tokens")
    assert usage.output_tokens == 8
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    without = client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": QUESTION}])
    assert without.input_tokens < counted.input_tokens


def test_a_stream_gives_the_text_and_the_whole_message(client: anthropic.Anthropic, ask: list[Any]) -> None:
    with client.messages.stream(model=MODEL, messages=ask, max_tokens=16) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert [block.text for block in message.content if block.type == "text"] == [text]
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 16)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]
)
def test_a_tool_is_called_and_its_answer_taken(client: anthropic.Anthropic, is_stream: bool, choice: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    options: Any = {"model": MODEL, "max_tokens": 1000, "tools": [TOOL], "tool_choice": choice}
    if is_stream:
        with client.messages.stream(messages=messages, **options) as stream:
            partial = "".join(event.partial_json for event in stream if event.type == "input_json")
            message = stream.get_final_message()
    else:
        message, partial = client.messages.create(messages=messages, **options), ""
    assert message.stop_reason == "tool_use"
    calls = [block for block in message.content if block.type == "tool_use"]
    for call in calls:
        assert call.name == "weather"
        assert Place.model_validate(call.input)
    if is_stream:
        assert [json.loads(partial)] == [call.input for call in calls]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in calls]
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    assert client.messages.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=8).content


def test_parse_gives_an_object(client: anthropic.Anthropic, ask: list[Any]) -> None:
    message = client.messages.parse(model=MODEL, messages=ask, max_tokens=1000, output_format=Seen)
    assert isinstance(message.parsed_output, Seen)


def test_an_error_is_an_exception_with_its_type(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model=MODEL, messages=[], max_tokens=8)
    assert caught.value.type == "invalid_request_error"
