"""Reasoning split off from answers, with templates that open it, leave it to the model, or are told not to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.server.conftest import Parts, Running, Serve

ASK: Any = [{"role": "user", "content": "Is it?"}]
HYBRID = (
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"  # noqa: E501
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS = HYBRID.replace("A:", "A:<think>\n")
THOUGHT = "hm, so\n\nyes\n</think>\n\nIt is.\n"


@pytest.fixture
async def think(tokenizer: Tokenizer) -> AsyncIterator[Serve]:
    """`await think(source, text)` starts a server of a model with this template that says this text."""
    async with AsyncExitStack() as stack:

        async def start(source: str, text: str, **options: Any) -> Running:
            parts = Parts(tokenizer, ChatTemplate(source, tokenizer))
            return await stack.enter_async_context(parts.running(text, **options))

        yield start


async def answer(running: Running, **fields: Any) -> dict[str, Any]:
    reply = await running.post("/v1/chat/completions", {"messages": ASK, **fields})
    assert reply.status_code == 200, reply.text
    whole: dict[str, Any] = reply.json()
    return whole


@pytest.mark.parametrize(("source", "text"), [(ALWAYS, THOUGHT), (HYBRID, f"<think>\n{THOUGHT}")])
async def test_reasoning_stands_apart_and_is_counted(
    think: Serve, tokenizer: Tokenizer, source: str, text: str
) -> None:
    reply = await answer(await think(source, text))
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, so\n\nyes", "It is.\n")
    reasoning = text[: text.index("</think>") + len("</think>")]
    assert reply["usage"]["completion_tokens"] == len(tokenizer.encode_text(text)) + 1
    counted = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert abs(counted - len(tokenizer.encode_text(reasoning))) <= len(tokenizer.encode_text("<think>"))


async def test_a_stream_tells_reasoning_first(think: Serve, openai_client: Any) -> None:
    client = openai_client(await think(ALWAYS, THOUGHT))
    deltas = [
        chunk.choices[0].delta
        async for chunk in await client.chat.completions.create(model="model", messages=ASK, stream=True)
    ]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert ("".join(thoughts), "".join(d.content or "" for d in deltas)) == ("hm, so\n\nyes", "It is.\n")
    last_thought = max(i for i, text in enumerate(thoughts) if text)
    assert all(not delta.content for delta in deltas[: last_thought + 1])


async def test_the_limit_counts_reasoning(think: Serve) -> None:
    reply = await answer(await think(ALWAYS, THOUGHT), max_completion_tokens=3)
    choice = reply["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning_content"]
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


async def test_reasoning_that_is_not_wanted_is_left_out(think: Serve) -> None:
    reply = await answer(await think(ALWAYS, THOUGHT), include_reasoning=False)
    assert "reasoning_content" not in reply["choices"][0]["message"]
    assert reply["choices"][0]["message"]["content"] == "It is.\n"


@pytest.mark.parametrize("off", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}])
async def test_thinking_can_be_turned_off(think: Serve, tokenizer: Tokenizer, off: Any) -> None:
    running = await think(HYBRID, "It is.")
    reply = await answer(running, **off)
    assert "reasoning_content" not in reply["choices"][0]["message"]
    prompt = tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False)
    assert prompt.endswith("A:<think>\n\n</think>\n\n")


async def test_earlier_reasoning_reaches_the_template(think: Serve, tokenizer: Tokenizer) -> None:
    running = await think(HYBRID, "x")
    turns = [*ASK, {"role": "assistant", "content": "It is.", "reasoning_content": "hm"}, *ASK]
    await answer(running, messages=turns)
    prompt = tokenizer.decode(running.engine.requests[0].prompt_ids, skip_special=False)
    assert "assistant: <think>hm</think>It is." in prompt


@pytest.mark.parametrize(("source", "begin"), [(ALWAYS, ""), (HYBRID, "<think>")])
async def test_a_form_of_the_answer_leaves_reasoning_free(think: Serve, source: str, begin: str) -> None:
    running = await think(source, "x")
    await answer(running, response_format={"type": "json_object"})
    assert running.engine.requests[0].params.grammar.thought == (begin, "</think>")
    await answer(running, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required")
    assert running.engine.requests[1].params.grammar.thought == (begin, "</think>")
