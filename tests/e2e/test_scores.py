"""A Qwen3-VL as a reranker behind the real commands: the scores of `VLM`, over HTTP and from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from dashinfer_vlm import VLM
from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.run import run
from tests.conftest import CheckpointMaker
from tests.e2e.serving import Server
from tests.e2e.test_qwen3_vl import FILM, FLAGS, picture, png
from tests.rerankers import publish

QUERY = "Who stands in the reeds?"
SEEN = {"content": [picture(png(300, 260, 1)), {"type": "text", "text": "a heron"}]}
DOCUMENTS: list[Any] = ["A heron stands there.", SEEN, {"content": [FILM]}, "It rains."]


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(checkpoint("qwen3_vl"), tmp_path_factory.mktemp("published") / "reranker")


@pytest.fixture(scope="module")
def scores(folder: Path) -> np.ndarray:
    with VLM(folder, device="cpu", progress=False, **FLAGS) as vlm:
        found: np.ndarray = vlm.score(QUERY, [each if isinstance(each, str) else each["content"] for each in DOCUMENTS])
    assert np.ptp(found) > 0.001
    return found


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    server = Server("--model", str(folder), "--port", "0", *flags)
    try:
        yield openai.OpenAI(base_url=f"{server.wait_ready()}/v1", api_key="EMPTY", max_retries=0)
    finally:
        server.kill()


def test_scores_over_http_are_those_of_python(client: openai.OpenAI, scores: np.ndarray) -> None:
    asked = {"model": "model", "query": QUERY, "documents": DOCUMENTS}
    ranked: Any = client.post("/rerank", cast_to=object, body=asked)
    told = {result["index"]: result["relevance_score"] for result in ranked["results"]}
    np.testing.assert_allclose([told[i] for i in range(4)], scores, atol=1e-5)
    assert [result["index"] for result in ranked["results"]] == np.argsort(-scores, kind="stable").tolist()
    pairs: Any = client.post("/score", cast_to=object, body={"text_1": QUERY, "text_2": DOCUMENTS})
    np.testing.assert_allclose([item["score"] for item in pairs["data"]], scores, atol=1e-5)
    assert pairs["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_it_answers_as_well(client: openai.OpenAI) -> None:
    turn: Any = {"role": "user", "content": "Hello"}
    reply = client.chat.completions.create(model="model", messages=[turn], max_tokens=4)
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0
    with pytest.raises(openai.NotFoundError, match="it scores pairs"):
        client.embeddings.create(model="model", input="a heron")


def test_a_file_asks_for_scores(folder: Path, scores: np.ndarray, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"query": QUERY, "documents": DOCUMENTS, "top_n": 1}
    source.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/rerank", "body": body}))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    assert execute(run, [str(source), "-o", str(target), "--model", str(folder), "--device", "cpu", *flags]) == 0
    (best,) = json.loads(target.read_text())["response"]["body"]["results"]
    assert best["index"] == scores.argmax()
