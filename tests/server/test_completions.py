"""Text completions through the OpenAI client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.server.conftest import Serve
from tests.tokens import IMAGE, VOCAB

Client = Callable[..., AsyncOpenAI]
PATH = "/v1/completions"


async def test_a_prompt_is_continued_as_plain_text(serve: Serve, openai_client: Client, tokenizer: Tokenizer) -> None:
    running = await serve("world")
    reply = await openai_client(running).completions.create(model="model", prompt="hello <|im_end|>")
    assert (reply.choices[0].text, reply.choices[0].finish_reason, reply.object) == ("world", "stop", "text_completion")
    assert running.engine.requests[0].prompt_ids == tokenizer.encode_text("hello <|im_end|>")
    assert running.engine.requests[0].params.max_tokens == 16


async def test_prompts_of_every_form_get_their_choices_in_order(serve: Serve) -> None:
    running = await serve()
    running.engine.answer = lambda request: request.prompt_ids
    q, z = 80, 89  # ids of letters: any two will do
    forms: list[tuple[Any, int]] = [("q", 1), (["q", "z"], 2), ([q, z], 1), ([[q], [z]], 2)]
    for prompt, num_choices in forms:
        body = (await running.post(PATH, {"prompt": prompt, "n": 2})).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * num_choices))
        texts = [choice["text"] for choice in body["choices"]]
        assert texts[::2] == texts[1::2]
    assert running.engine.requests[-1].prompt_ids == [z]


async def test_a_stream_ends_with_usage_and_done(serve: Serve, openai_client: Client) -> None:
    stream = await openai_client(await serve("né 😀")).completions.create(
        model="model", prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "né 😀"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_offsets_into_the_text(serve: Serve, stream: bool, openai_client: Client) -> None:
    client = openai_client(await serve("qzq")).completions
    options: Any = {"model": "model", "prompt": "x", "logprobs": 1}
    if stream:
        found = [chunk.choices[0].logprobs async for chunk in await client.create(stream=True, **options)]
    else:
        found = [(await client.create(**options)).choices[0].logprobs]
    rows = [logprobs for logprobs in found if logprobs]
    assert [token for row in rows for token in row.tokens or ()] == ["q", "z", "q"]
    assert [offset for row in rows for offset in row.text_offset or ()] == [0, 1, 2]
    assert [top for row in rows for top in row.top_logprobs or ()] == [{"q": -0.5}, {"z": -0.5}, {"q": -0.5}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [VOCAB]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [IMAGE]}, "prompt"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "messages": []}, "messages"),
    ],
)
def test_a_bad_prompt_is_400_and_names_the_field(shared: httpx.Client, body: dict[str, Any], param: str) -> None:
    reply = shared.post(PATH, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
