"""A Qwen3-VL without a head behind the real command: OpenAI's client, and the vectors of `VLM`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from dashinfer_vlm import VLM
from tests.conftest import CheckpointMaker
from tests.e2e.serving import Server
from tests.e2e.test_qwen3_vl import FILM, FLAGS, picture, png, question

TEXTS = [f"Number {i} of many herons" for i in range(300)]
ASKED = [question(picture(png(300, 260, 1)), "a heron"), question(FILM)]


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "qwen3_vl"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    (folder / "modules.json").write_text('[{"type": "Transformer"}]')
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    server = Server("--model", str(folder), "--port", "0", *flags)
    try:
        yield openai.OpenAI(base_url=f"{server.wait_ready()}/v1", api_key="EMPTY", max_retries=0)
    finally:
        server.kill()


def test_vectors_over_http_are_those_of_python(folder: Path, client: openai.OpenAI) -> None:
    texts = client.embeddings.create(model="model", input=TEXTS)
    turns = [client.post("/embeddings", cast_to=object, body={"messages": [turn]}) for turn in ASKED]
    with VLM(folder, device="cpu", progress=False, **FLAGS) as vlm:
        of_texts, of_turns = vlm.embed(TEXTS), vlm.embed([[turn] for turn in ASKED])
    np.testing.assert_allclose(np.array([item.embedding for item in texts.data]), of_texts, atol=1e-5)
    for told, vector in zip(turns, of_turns, strict=True):
        np.testing.assert_allclose(numbers(told), vector, atol=1e-5)
    assert texts.usage.prompt_tokens > 3 * len(TEXTS)


def numbers(reply: Any) -> list[float]:
    found: list[float] = reply["data"][0]["embedding"]
    return found


def test_it_writes_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no head to write with"):
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Hello"}])
