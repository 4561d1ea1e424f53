"""openai-python: `parse`, `stream`, tools, pictures."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from conftest import MODEL, QUESTION, Place, Seen

pytestmark = pytest.mark.clients


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0)


def ask(picture: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def test_parse_gives_an_object(client: openai.OpenAI, picture: str) -> None:
    reply = client.chat.completions.parse(
        model=MODEL, messages=ask(picture), response_format=Seen, temperature=0, max_tokens=1000
    )
    assert isinstance(reply.choices[0].message.parsed, Seen)


def test_stream_gives_an_object_at_its_end(client: openai.OpenAI, picture: str) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=ask(picture), response_format=Seen, temperature=0, max_tokens=1000
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert isinstance(final.choices[0].message.parsed, Seen)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool_is_called_and_its_answer_taken(client: openai.OpenAI, is_stream: bool) -> None:
    tool = openai.pydantic_function_tool(Place, name="weather")
    messages: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    options: dict[str, Any] = {"model": MODEL, "tools": [tool], "tool_choice": "required", "max_tokens": 1000}
    if is_stream:
        with client.chat.completions.stream(messages=messages, **options) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.parse(messages=messages, **options).choices[0].message
    assert message.tool_calls
    call = message.tool_calls[0]
    assert call.function.name == "weather"
    assert isinstance(call.function.parsed_arguments, Place)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"degrees": 20})}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=10)
    assert answer.choices[0].message.content


def test_an_error_is_an_exception_with_its_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[])
    assert (caught.value.code, caught.value.param) == ("invalid_value", "messages")
