"""The documented API gives the tokens that the HTTP server gives for the same request."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

import allspark
from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.engine.host.local import LocalEngine
from dashinfer_vlm.frontend.opening import open_service
from dashinfer_vlm.offline import Encoder
from dashinfer_vlm.server.app import create_app
from tests.allspark.conftest import MAX_LENGTH, Ask, media

pytestmark = pytest.mark.asyncio(loop_scope="module")
NUM_TOKENS = 12
NEUTRAL = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""The server fills in what the checkpoint recommends; the documented API does not."""


async def start(config: EngineConfig) -> EngineClient:
    return LocalEngine.start(config)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The server's application over an engine of its own."""
    config = EngineConfig(
        model=str(folder), dtype="float32", device="cpu", max_model_len=MAX_LENGTH, kv_cache_gib=0.1, threads=1
    )
    async with open_service(config, MediaConfig(), start_engine=start) as service:
        transport = httpx.ASGITransport(create_app(service, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await http.post(path, json={"model": "model", "max_tokens": NUM_TOKENS, **NEUTRAL, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


SAMPLED = {"seed": 7, "temperature": 1.3}
KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"do_sample": False}, {"temperature": 0}),
    "top_k 1": ({"top_k": 1}, {"top_k": 1}),
    "temperature": (SAMPLED, SAMPLED),
    "top_k": ({**SAMPLED, "top_k": 5}, {**SAMPLED, "top_k": 5}),
    "top_p": ({**SAMPLED, "top_p": 0.3}, {**SAMPLED, "top_p": 0.3}),
    "repetition": ({**SAMPLED, "repetition_penalty": 1.5}, {**SAMPLED, "repetition_penalty": 1.5}),
    "presence": ({**SAMPLED, "presence_penalty": 1.5}, {**SAMPLED, "presence_penalty": 1.5}),
    "frequency": ({**SAMPLED, "frequency_penalty": 1.5}, {**SAMPLED, "frequency_penalty": 1.5}),
    "presence rather than repetition": (
        {**SAMPLED, "repetition_penalty": 3.0, "presence_penalty": 1.0, "suppress_repetition_in_generation": True},
        {**SAMPLED, "presence_penalty": 1.0},
    ),
    "ngrams": ({"temperature": 0.0, "no_repeat_ngram_size": 2}, {"temperature": 0, "no_repeat_ngram_size": 2}),
    "all at once": (
        {
            **SAMPLED,
            "top_k": 50,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.2,
        },
        {
            **SAMPLED,
            "top_k": 50,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.2,
        },
    ),
}


@pytest.mark.parametrize("name", KEYS)
async def test_every_sampling_key_means_the_same(
    name: str, http: httpx.AsyncClient, ask: Ask, loader: allspark.HuggingFaceModel
) -> None:
    ours, theirs = KEYS[name]
    ids = list(range(900, 920))
    choice = await post(http, "/v1/completions", prompt=ids, logprobs=0, ignore_eos=True, **theirs)
    keys = {"max_length": len(ids) + NUM_TOKENS, "early_stopping": False, "logprobs": True, **ours}
    answer = ask(ids, keys)
    assert len(answer.ids) == NUM_TOKENS
    assert loader.get_tokenizer().decode(answer.ids) == choice["text"]
    assert answer.logprobs == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)


async def test_ends_mean_the_same(http: httpx.AsyncClient, ask: Ask) -> None:
    ids = list(range(900, 920))
    keys = {"max_length": len(ids) + NUM_TOKENS, "seed": 5, "temperature": 1.0}
    free = ask(ids, {**keys, "early_stopping": False}).ids
    assert ask(ids, {**keys, "eos_token_id": free[4]}).ids == free[: free.index(free[4])]
    assert ask(ids, {**keys, "stop_words_ids": [[free[4]]]}).ids == free[: free.index(free[4])]
    assert ask(ids, {**keys, "stop_words_ids": [free[3:5]]}).ids == free[:5]
    body = {"seed": 5, "temperature": 1.0, "stop_token_ids": [free[4]], "logprobs": 0}
    choice = await post(http, "/v1/completions", prompt=ids, **body)
    assert len(choice["logprobs"]["token_logprobs"]) == free.index(free[4])
    longer = ask(ids, {**keys, "eos_token_id": free[4], "min_length": 6}).ids
    assert len(longer) >= 6


async def test_a_picture_encoded_apart_gives_the_answer_of_the_server(
    http: httpx.AsyncClient, ask: Ask, folder: Path
) -> None:
    rng = np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((84, 56, 3), (56, 140, 3))]
    parts: list[Any] = [pictures[0], "and", pictures[1], "differ?"]
    content = [{"type": "text", "text": p} if isinstance(p, str) else _url(p) for p in parts]
    messages = [{"role": "user", "content": content}]
    choice = await post(http, "/v1/chat/completions", messages=messages, logprobs=True, temperature=0, ignore_eos=True)
    expected = [row["logprob"] for row in choice["logprobs"]["content"]]

    with Encoder(folder, dtype="float32", device="cpu", threads=1) as encoder:
        prompt = await encoder.aencode([{"role": "user", "content": parts}])
    assert [len(e) for e in prompt.embeddings] == [6, 10]
    assert prompt.grids == [(1, 6, 4), (1, 4, 10)]
    keys = {"max_length": len(prompt.ids) + NUM_TOKENS, "do_sample": False, "early_stopping": False, "logprobs": True}
    by_position = media(str(prompt.placeholders[0]), *prompt.embeddings, positions=prompt.positions)
    by_grid = media(str(prompt.placeholders[0]), *prompt.embeddings, grid_thw=np.array(prompt.grids))
    for info in (by_position, by_grid):
        assert ask(prompt.ids, keys, mm_info=info).logprobs == pytest.approx(expected, abs=1e-5)


def _url(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"},
    }
