"""What vLLM's users ask for beyond OpenAI's fields, in chat and in completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.frontend.scripted import EOS
from tests.server.conftest import Running, Serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


def hello(**options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], **options}


async def stream(running: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Its events, without the last word."""
    lines = (await running.post(path, {**body, "stream": True})).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_chat_tells_the_ids_of_prompt_and_answer(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve("hello world")
    reply = (await running.post(CHAT, hello(return_token_ids=True))).json()
    assert reply["prompt_token_ids"] == running.engine.requests[0].prompt_ids
    assert reply["choices"][0]["token_ids"] == [*tokenizer.encode_text("hello world"), EOS]


async def test_a_chat_stream_tells_the_prompt_first_and_then_the_ids_of_each_event(
    serve: Serve, tokenizer: Tokenizer
) -> None:
    running = await serve("hello world")
    events = await stream(running, CHAT, hello(return_token_ids=True))
    assert events[0]["prompt_token_ids"] == running.engine.requests[0].prompt_ids
    assert not any("prompt_token_ids" in event for event in events[1:])
    told = [event["choices"][0].get("token_ids", []) for event in events]
    assert [id for ids in told for id in ids] == [*tokenizer.encode_text("hello world"), EOS]
    assert told[-1] == [EOS]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_completions_tell_ids_in_each_choice(serve: Serve, tokenizer: Tokenizer, is_stream: bool) -> None:
    running = await serve("hello")
    body = {"prompt": ["a", "b"], "return_token_ids": True}
    if is_stream:
        choices = [event["choices"][0] for event in await stream(running, TEXT, body)]
    else:
        choices = (await running.post(TEXT, body)).json()["choices"]
    for index, prompt in enumerate("ab"):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["prompt_token_ids"] == tokenizer.encode_text(prompt)
        assert [id for choice in own for id in choice["token_ids"]] == [*tokenizer.encode_text("hello"), EOS]


async def test_ids_that_nobody_asked_for_are_not_told(serve: Serve) -> None:
    running = await serve()
    text = (await running.post(CHAT, hello())).text
    assert "token_ids" not in text
    assert "prompt_logprobs" not in text


async def test_prompt_logprobs_have_vllms_form(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve()
    reply = (await running.post(TEXT, {"prompt": "a b", "prompt_logprobs": 1, "n": 2})).json()
    first, second = tokenizer.encode_text("a b")
    told = [
        None,
        {
            str(second): {"logprob": -9999.0, "rank": 2, "decoded_token": " b"},
            str(first): {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert [choice["prompt_logprobs"] for choice in reply["choices"]] == [told, told]
    assert [request.params.prompt_logprobs for request in running.engine.requests] == [1, None]


async def test_chat_tells_the_prompts_log_probabilities_beside_its_choices(serve: Serve) -> None:
    running = await serve()
    reply = (await running.post(CHAT, hello(prompt_logprobs=0))).json()
    ids = running.engine.requests[0].prompt_ids
    assert reply["prompt_logprobs"][0] is None
    assert [list(row) for row in reply["prompt_logprobs"][1:]] == [[str(id)] for id in ids[1:]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 4096}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 4000, "max_tokens": 100}, "truncate_prompt_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x" * 1025]}, "bad_words"),
        ({"bad_words": ["x"] * 1001}, "bad_words"),
        ({"bad_words": [f"w{i}" for i in range(1000)]}, "bad_words"),
        ({"priority": 2**63}, "priority"),
        ({"priority": 0.5}, "priority"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(shared: httpx.Client, fields: dict[str, Any], param: str) -> None:
    for path, body in ((CHAT, hello()), (TEXT, {"prompt": "hi"})):
        reply = shared.post(path, json=body | fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(("side", "kept"), [(None, slice(-3, None)), ("left", slice(-3, None)), ("right", slice(3))])
async def test_a_prompt_is_cut_where_its_sender_says(
    serve: Serve, tokenizer: Tokenizer, side: str | None, kept: slice
) -> None:
    running = await serve()
    ids = tokenizer.encode_text("one two three four five")
    body = {"truncate_prompt_tokens": 3, "truncation_side": side}
    for prompt in ("one two three four five", ids):
        assert (await running.post(TEXT, {"prompt": prompt, **body})).status_code == 200
    assert [request.prompt_ids for request in running.engine.requests] == [ids[kept]] * 2
    assert (await running.post(CHAT, hello(truncate_prompt_tokens=4))).json()["usage"]["prompt_tokens"] == 4


async def test_minus_one_keeps_as_much_of_a_prompt_as_fits(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve()
    prompt = "word " * 5000
    reply = await running.post(TEXT, {"prompt": prompt, "truncate_prompt_tokens": -1, "max_tokens": 96})
    assert reply.json()["usage"]["prompt_tokens"] == 4000
    assert running.engine.requests[0].prompt_ids == tokenizer.encode_text(prompt)[-4000:]


async def test_a_prompt_that_would_lose_a_picture_is_refused(serve: Serve) -> None:
    running = await serve()
    body = {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what is on it?"}]}]}
    reply = await running.post(CHAT, {**body, "truncate_prompt_tokens": 5})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "truncate_prompt_tokens")
    assert "takes away 1 of 1 images" in reply.json()["error"]["message"]
    assert not running.loader.loaded


async def test_bad_words_are_told_the_engine_with_and_without_a_blank(serve: Serve, tokenizer: Tokenizer) -> None:
    running = await serve()
    await running.post(TEXT, {"prompt": "hi", "bad_words": ["cat", " cat", "café"]})
    words = running.engine.requests[0].params.bad_words
    assert [tokenizer.decode(ids) for ids in words[:3]] == ["cat", " cat", "café"]


async def test_priority_is_told_the_engine(serve: Serve) -> None:
    running = await serve()
    for priority in (None, 0, -7):
        await running.post(CHAT, hello(priority=priority))
    assert [request.priority for request in running.engine.requests] == [0, 0, -7]
