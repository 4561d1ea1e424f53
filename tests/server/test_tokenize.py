"""`/tokenize` tells what a request would cost; `/detokenize` what ids say."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.server.conftest import Serve
from tests.tokens import IM_END

LOOK: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]


def test_text_is_tokenised_as_a_prompt_would_be(shared: httpx.Client, tokenizer: Tokenizer) -> None:
    reply = shared.post("/tokenize", json={"prompt": "né<|im_end|>", "return_token_strs": True}).json()
    ids = tokenizer.encode_text("né<|im_end|>")
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 4096)
    assert len(reply["token_strs"]) == len(ids)


async def test_a_conversation_counts_its_images_and_gives_them_back(serve: Serve) -> None:
    running = await serve()
    counted = (await running.post("/tokenize", {"messages": LOOK})).json()
    answered = (await running.post("/v1/chat/completions", {"messages": LOOK})).json()
    assert counted["count"] == answered["usage"]["prompt_tokens"]
    assert counted["tokens"] == running.engine.requests[0].prompt_ids
    assert running.loader.num_held == running.service.num_in_flight == 0


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_tools_count_where_the_model_is_shown_them(serve: Serve, choice: str) -> None:
    running = await serve()
    tools = [{"type": "function", "function": {"name": "weather"}}]
    body = {"messages": LOOK, "tools": tools, "tool_choice": choice}
    counted = (await running.post("/tokenize", body)).json()
    await running.post("/v1/chat/completions", body)
    assert counted["tokens"] == running.engine.requests[0].prompt_ids
    assert (counted["count"] > (await running.post("/tokenize", {"messages": LOOK})).json()["count"]) == (
        choice == "auto"
    )


def test_ids_are_turned_back_into_text(shared: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_text("né 😀"), IM_END]
    assert shared.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "né 😀<|im_end|>"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": LOOK}),
        ("/tokenize", {"prompt": "x", "nonsense": 1}),
        ("/tokenize", {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["x"]}),
        ("/detokenize", {"tokens": [2**40]}),
    ],
)
def test_bad_bodies_are_400(shared: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert shared.post(path, json=body).status_code == 400
