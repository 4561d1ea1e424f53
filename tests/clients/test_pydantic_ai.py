"""pydantic-ai: output by tool, by schema and by prompt; tools; pictures."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput, UsageLimitExceeded, UsageLimits
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from conftest import MODEL, QUESTION, Seen

pytestmark = pytest.mark.clients


def agent(url: str, output: Any) -> Agent[None, Any]:
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="EMPTY"))
    return Agent(model, output_type=output, model_settings=ModelSettings(temperature=0, max_tokens=1000), retries=0)


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput])
def test_an_output_is_an_object(url: str, output: Any, png: bytes) -> None:
    result = agent(url, output(Seen)).run_sync([QUESTION, BinaryContent(png, media_type="image/png")])
    assert isinstance(result.output, Seen)


def test_text_is_streamed(url: str) -> None:
    assert agent(url, str).run_stream_sync("hi").get_output()


def test_a_tool_is_called_by_the_model(url: str) -> None:
    """`required`, since output is a tool as well: random weights choose the other one until they may not any more."""
    called: list[str] = []
    asking = agent(url, ToolOutput(Seen))

    @asking.tool_plain
    def weather(city: Literal["Paris", "Rome"]) -> str:
        called.append(city)
        return "sunny"

    with pytest.raises(UsageLimitExceeded):
        asking.run_sync("How is the weather?", usage_limits=UsageLimits(request_limit=2))
    assert set(called) <= {"Paris", "Rome"}
    assert called
