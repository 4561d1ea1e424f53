"""openai-python's `responses`: create, parse, stream, tools, pictures, the next turn."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from conftest import MODEL, QUESTION, Place, Seen

pytestmark = pytest.mark.clients


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0)


def ask(picture: str) -> list[Any]:
    parts = [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def test_parse_gives_an_object(client: openai.OpenAI, picture: str) -> None:
    reply = client.responses.parse(
        model=MODEL, input=ask(picture), text_format=Seen, temperature=0, max_output_tokens=1000
    )
    assert isinstance(reply.output_parsed, Seen)


def test_a_stream_ends_with_the_whole_response(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "hi", "temperature": 0, "max_output_tokens": 1000}
    with client.responses.stream(text_format=Seen, **options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert isinstance(final.output_parsed, Seen)
    assert final.usage


def test_a_tool_is_called_and_its_answer_taken_in_the_next_turn(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Place, name="weather")["function"]
    options: dict[str, Any] = {"model": MODEL, "tools": [{"type": "function", **tool}], "max_output_tokens": 1000}
    first = client.responses.create(input="How is the weather?", tool_choice="required", **options)
    call = next(item for item in first.output if item.type == "function_call")
    assert Place.model_validate_json(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(input=[result], previous_response_id=first.id, model=MODEL, max_output_tokens=8)
    assert client.responses.retrieve(second.id).id == second.id
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
