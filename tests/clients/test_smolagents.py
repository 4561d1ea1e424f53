"""smolagents' ToolCallingAgent: `tool_choice: "required"`, calls and their answers in turns."""

from __future__ import annotations

import pytest
from smolagents import OpenAIServerModel, Tool, ToolCallingAgent

from conftest import MODEL

pytestmark = pytest.mark.clients


class Weather(Tool):  # type: ignore[misc]
    name = "weather"
    description = "The weather of a city."
    inputs = {"city": {"type": "string", "description": "Which one.", "enum": ["Paris", "Rome"]}}
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"sunny in {city}"


def test_an_agent_calls_tools_until_its_steps_are_used_up(url: str) -> None:
    model = OpenAIServerModel(MODEL, api_base=url, api_key="EMPTY", max_tokens=1000, temperature=0)
    agent = ToolCallingAgent(tools=[Weather()], model=model, max_steps=2, verbosity_level=0)
    agent.run("How is the weather in Paris?")
    steps = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    assert steps
    assert {call.name for step in steps for call in step.tool_calls} <= {"weather", "final_answer"}
