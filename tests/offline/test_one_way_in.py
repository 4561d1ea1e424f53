"""One conversation gets one answer, whichever way it comes in: HTTP, a batch file, or Python."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from fastapi import FastAPI
from PIL import Image

from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.engine.host.local import LocalEngine
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.opening import open_service
from dashinfer_vlm.server.app import create_app
from dashinfer_vlm.server.batches.ends import BatchInput, BatchOutput
from dashinfer_vlm.server.batches.run import BatchRun
from tests.conftest import CheckpointMaker


def picture(width: int, height: int, kind: str = "PNG") -> str:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


pytestmark = pytest.mark.asyncio(loop_scope="module")
LARGE = f"data:image/png;base64,{picture(840, 644)}"
BARE = "\n".join(picture(112, 84).rstrip("=").replace("+", "-").replace("/", "_").partition("A"))
FRAMES = ",".join(picture(112, 112, "JPEG") for _ in range(4))
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Søren"}],
    "low detail": user({"type": "image_url", "image_url": {"url": LARGE, "detail": "low"}}, "What?"),
    "original detail": user({"type": "image_url", "image_url": {"url": LARGE, "detail": "original"}}, "What?"),
    "qwen's form": user({"type": "image", "image": LARGE, "max_pixels": 50_000.0}, {"type": "text", "text": "What?"}),
    "a size": user({"type": "image", "image": LARGE, "resized_height": 280, "resized_width": 420}, "What?"),
    "bare base64": user({"type": "image_url", "image_url": f"data:image;base64,{BARE}"}, "What?"),
    "places": [*user("Where?"), {"role": "assistant", "content": "<|box_start|>(1,2)<|box_end|>"}, *user("Sure?")],
    "frames": user({"type": "video_url", "video_url": f"data:video/jpeg;base64,{FRAMES}", "fps": [2.0]}),
    "broken picture": user("Look:", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
    "no type": user({"text": "Hi"}),
    "unknown field": user({"type": "image", "image": LARGE, "size": 3}),
    "unknown role": [{"role": "robot", "content": "Hi"}],
}


async def start(config: EngineConfig) -> EngineClient:
    return LocalEngine.start(config)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(checkpoint: CheckpointMaker) -> AsyncIterator[FastAPI]:
    config = EngineConfig(
        model=str(checkpoint()), dtype="float32", device="cpu", max_model_len=1024, kv_cache_gib=0.1, threads=1
    )

    async with open_service(config, MediaConfig(), start_engine=start) as service:
        yield create_app(service, ServerConfig())


async def through_http(app: FastAPI, body: dict[str, Any]) -> dict[str, Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer: dict[str, Any] = (await client.post("/v1/chat/completions", json=body)).json()
        return answer


async def through_a_batch(app: FastAPI, body: dict[str, Any], folder: Path) -> dict[str, Any]:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n")
    output = BatchOutput(folder / "out.jsonl")
    try:
        run = BatchRun(app, output, window=lambda: 1, is_alive=lambda: True, on_record=lambda _: None)
        await run.run(BatchInput(folder / "in.jsonl"))
    finally:
        output.close()
    answer: dict[str, Any] = json.loads((folder / "out.jsonl").read_bytes())["response"]["body"]
    return answer


def told(answer: dict[str, Any]) -> tuple[str, Any]:
    """Its text and the length of its prompt, or its error and where that is."""
    if "error" in answer:
        return answer["error"]["message"], answer["error"]["param"]
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


async def through_python(vlm: VLM, conversation: list[dict[str, Any]]) -> tuple[str, Any]:
    try:
        result = await vlm.achat(conversation, SamplingParams(temperature=0, max_tokens=8))
    except InvalidRequestError as error:
        return str(error), error.param
    return result.text, result.usage.num_prompt_tokens


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_a_conversation_is_answered_alike_in_every_way(name: str, app: FastAPI, vlm: VLM, tmp_path: Path) -> None:
    conversation = CONVERSATIONS[name]
    body = {"messages": conversation, "temperature": 0, "max_tokens": 8}
    answer = told(await through_http(app, body))
    assert told(await through_a_batch(app, body, tmp_path)) == answer
    assert await through_python(vlm, conversation) == answer


async def test_an_error_of_a_medium_names_the_field_that_holds_its_url(vlm: VLM) -> None:
    assert (await through_python(vlm, CONVERSATIONS["broken picture"]))[1] == "messages[0].content[1].image_url.url"


async def test_low_detail_costs_fewer_tokens_in_python_too(vlm: VLM) -> None:
    low, full = [(await through_python(vlm, CONVERSATIONS[f"{name} detail"]))[1] for name in ("low", "original")]
    assert low < full
