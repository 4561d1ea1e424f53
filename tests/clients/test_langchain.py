"""LangChain: `with_structured_output` in its three ways, `bind_tools`, streams."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from conftest import MODEL, QUESTION, Place, Seen

pytestmark = pytest.mark.clients


@pytest.fixture
def model(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="EMPTY", model=MODEL, temperature=0, max_tokens=1000, max_retries=0)


def question(picture: str) -> list[HumanMessage]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    return [HumanMessage(parts)]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object(
    model: ChatOpenAI, picture: str, method: Literal["json_schema", "function_calling"]
) -> None:
    answer = model.with_structured_output(Seen, method=method).invoke(question(picture))
    assert isinstance(answer, Seen)


def test_json_mode_gives_some_object(model: ChatOpenAI, picture: str) -> None:
    """Of which form is for the prompt to say, and random weights follow none."""
    answer = model.with_structured_output(Seen, method="json_mode", include_raw=True).invoke(question(picture))
    assert isinstance(answer, dict)
    assert answer["raw"].content.lstrip().startswith("{")


@pytest.mark.parametrize("is_stream", [False, True])
def test_bound_tools_are_called(model: ChatOpenAI, is_stream: bool) -> None:
    bound = model.bind_tools([Place], tool_choice="any")
    if is_stream:
        chunks = list(bound.stream("How is the weather?"))
        message = chunks[0]
        for chunk in chunks[1:]:
            message += chunk
    else:
        message = bound.invoke("How is the weather?")
    assert [call["name"] for call in message.tool_calls] == ["Place"] * len(message.tool_calls)
    assert Place(**message.tool_calls[0]["args"])


def test_a_stream_tells_its_usage(model: ChatOpenAI) -> None:
    chunks = list(model.stream("hi", stream_usage=True))
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) > 0
