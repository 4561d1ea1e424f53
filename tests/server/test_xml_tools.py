"""A model whose calls are XML, asked over every API: its clients see what they see of any other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.frontend.xml_template import QWEN3_5
from tests.server.conftest import Parts, Running, Serve

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n75000\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
ARGUMENTS = {"city": "75000", "days": 2}
ANSWER = f"So, I ask.\n</think>\n\nI ask twice.\n\n{CALL}\n{CALL}"


@pytest.fixture
async def say(tokenizer: Tokenizer) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(text: str) -> Running:
            return await stack.enter_async_context(Parts(tokenizer, ChatTemplate(QWEN3_5, tokenizer)).running(text))

        yield start


def read(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_chat_completions(say: Serve) -> None:
    running = await say(ANSWER)
    (choice,) = read(await running.post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS}))["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("So, I ask.", "I ask twice.")
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert calls == [("weather", ARGUMENTS)] * 2
    body = {"messages": [*ASK, message, {"role": "tool", "tool_call_id": "1", "content": "Rain."}], "tools": TOOLS}
    read(await running.post("/v1/chat/completions", body))
    prompt = running.service.tokenizer.decode(running.engine.requests[-1].prompt_ids, skip_special=False)
    assert f"<think>\n{ANSWER}<|im_end|>\n" in prompt, "the model sees its own turn as it wrote it"


async def test_a_stream_of_chat_completions(say: Serve, openai_client: Any) -> None:
    client = openai_client(await say(ANSWER))
    async with client.chat.completions.stream(model="model", messages=ASK, tools=TOOLS) as stream:
        thoughts = [
            getattr(event.chunk.choices[0].delta, "reasoning_content", None) or ""
            async for event in stream
            if event.type == "chunk" and event.chunk.choices
        ]
        (choice,) = (await stream.get_final_completion()).choices
    assert ("".join(thoughts), choice.message.content, choice.finish_reason) == (
        "So, I ask.",
        "I ask twice.",
        "tool_calls",
    )
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [ARGUMENTS] * 2


async def test_one_call_is_the_end_where_calls_are_not_parallel(say: Serve) -> None:
    fields = {"messages": ASK, "tools": TOOLS, "parallel_tool_calls": False}
    (choice,) = read(await (await say(f"{ANSWER} more")).post("/v1/chat/completions", fields))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_a_turn_without_thoughts(say: Serve) -> None:
    running = await say(CALL)
    body = {"messages": ASK, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    message = read(await running.post("/v1/chat/completions", body))["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"], len(message["tool_calls"])) == (None, None, 1)


async def test_messages_of_anthropic_s(say: Serve) -> None:
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    body = {"model": "model", "max_tokens": 400, "messages": ASK, "tools": tools}
    message = read(await (await say(ANSWER)).post("/v1/messages", body))
    assert message["stop_reason"] == "tool_use"
    thought, text, *calls = message["content"]
    assert (thought["thinking"], text["text"]) == ("So, I ask.", "I ask twice.")
    assert [call["input"] for call in calls] == [ARGUMENTS] * 2


async def test_responses(say: Serve) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]
    body = {"model": "model", "input": "What is the weather?", "tools": tools}
    output = read(await (await say(ANSWER)).post("/v1/responses", body))["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert [json.loads(item["arguments"]) for item in output[2:]] == [ARGUMENTS] * 2


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}])
async def test_a_grammar_asks_for_the_form_of_the_template(say: Serve, fields: Any) -> None:
    running = await say(ANSWER)
    message = read(await running.post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS, **fields}))
    assert message["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == json.dumps(ARGUMENTS)
    grammar = running.engine.requests[-1].params.grammar
    assert grammar is not None
    (form,) = json.loads(grammar.text)["forms"]
    assert (form["head"], form["tail"], form["xml"]) == ("\n<function=weather>\n", "</function>\n", True)
    assert form["schema"] == (SCHEMA if "tool_choice" in fields else {"type": "object"})
    assert grammar.thought == ("", "</think>")
