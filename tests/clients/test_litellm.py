"""litellm, as a library: structured output, tools, streams, pictures."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest

from conftest import MODEL, QUESTION, Place, Seen

pytestmark = pytest.mark.clients


def complete(url: str, content: Any, provider: str = "openai", **options: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{MODEL}",
        api_base=url,
        api_key="EMPTY",
        messages=[{"role": "user", "content": content}],
        **{"max_tokens": 1000, **options},
    )


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_schema_is_kept(url: str, provider: str, picture: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    reply = complete(url, parts, provider, response_format=Seen)
    assert Seen.model_validate_json(reply.choices[0].message.content)


def test_a_tool_is_called(url: str) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": Place.model_json_schema()}}
    reply = complete(url, "How is the weather?", tools=[tool], tool_choice="required")
    call = reply.choices[0].message.tool_calls[0]
    assert Place(**json.loads(call.function.arguments))


def test_a_stream_is_text_with_usage(url: str) -> None:
    chunks = list(complete(url, "hi", stream=True, stream_options={"include_usage": True}, max_tokens=20))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0
