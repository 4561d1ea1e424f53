"""`/v1/rerank` and `/v1/score` over a real socket, in the forms that clients of other servers send."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashinfer_vlm.errors import MediaError
from dashinfer_vlm.frontend.schema import Only, state_of
from dashinfer_vlm.frontend.scores import ScoreForm
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.models.family import ScorePrompt
from dashinfer_vlm.request import Request
from dashinfer_vlm.server.scores import RERANK_PATHS, SCORE_PATHS, RerankBody, ScoreBody
from tests.frontend.scripted import ScriptedLoader
from tests.server.conftest import Running, Serve
from tests.tokens import IMAGE

RERANK, SCORE = "/v1/rerank", "/v1/score"
URL = "https://example.org/a.png"
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
DOCUMENTS = ["hern" * 9, "a", "heron" * 3]
ORDER = [1, 2, 0]
"""Shorter ones are better here."""


def logit_of(request: Request) -> float:
    return 4 - len(request.prompt_ids) / 64


def vector_of(request: Request) -> bytes:
    return np.array([logit_of(request)], "<f4").tobytes()


def expected(running: Running, index: int) -> float:
    """The score of the engine's request `index`."""
    logit = float(np.float32(logit_of(running.engine.requests[index])))
    return 1 / (1 + math.exp(-logit))


@pytest.fixture
def form(tokenizer: Tokenizer) -> ScoreForm:
    prompt = ScorePrompt(instruction="Find it.", query="<Q>:", document="\n<D>:", opening="So ")
    return ScoreForm.by(prompt, tokenizer)


@pytest.fixture
def rank(serve: Serve, form: ScoreForm) -> Serve:
    """A server that scores."""

    async def start(**options: Any) -> Running:
        engine = {"vector": vector_of, **options.pop("engine", {})}
        running: Running = await serve(scores=form, engine=engine, **options)
        return running

    return start


def texts(running: Running, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(request.prompt_ids, skip_special=False) for request in running.engine.requests]


def prompt_of(query: str, document: str, instruction: str = "Find it.") -> str:
    judge = 'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    return f"{judge}<Instruct>: {instruction}<Q>:{query}\n<D>:{document}<|im_end|>\n<|im_start|>assistant\nSo "


@pytest.mark.parametrize("path", RERANK_PATHS)
async def test_documents_come_in_their_order(rank: Serve, tokenizer: Tokenizer, path: str) -> None:
    running = await rank()
    reply = await running.post(path, {"model": "model", "query": "bird", "documents": DOCUMENTS})
    body = reply.json()
    assert [result["index"] for result in body["results"]] == ORDER
    for result in body["results"]:
        assert result["relevance_score"] == pytest.approx(expected(running, result["index"]), abs=1e-7)
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert all(request.wants_vector for request in running.engine.requests)
    for text, document in zip(texts(running, tokenizer), DOCUMENTS, strict=True):
        assert text.endswith(prompt_of("bird", document))
        assert text.startswith("<|im_start|>system\nJudge whether the Document meets")
    counted = sum(len(request.prompt_ids) for request in running.engine.requests)
    details = {"cached_tokens": 0}
    assert body["usage"] == {"prompt_tokens": counted, "total_tokens": counted, "prompt_tokens_details": details}
    assert body["id"].startswith("rerank-")
    assert running.service.num_in_flight == 0


@pytest.mark.parametrize(("top_n", "num_results"), [(None, 3), (0, 3), (1, 1), (2, 2), (9, 3)])
async def test_only_the_best_are_told(rank: Serve, top_n: int | None, num_results: int) -> None:
    running = await rank()
    asked = {"query": "bird", "documents": DOCUMENTS, "top_n": top_n, "return_documents": False}
    results = (await running.post(RERANK, asked)).json()["results"]
    assert [result["index"] for result in results] == ORDER[:num_results]
    assert all("document" not in result for result in results)


async def test_equal_documents_keep_their_order(rank: Serve) -> None:
    running = await rank()
    results = (await running.post(RERANK, {"query": "bird", "documents": ["a", "b", "c"]})).json()["results"]
    assert [result["index"] for result in results] == [0, 1, 2]


@pytest.mark.parametrize("path", SCORE_PATHS)
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents")])
async def test_pairs_are_scored_in_the_order_in_which_they_are_sent(
    rank: Serve, tokenizer: Tokenizer, path: str, names: tuple[str, str]
) -> None:
    forms: list[tuple[Any, Any, list[tuple[str, str]]]] = [
        ("q", "d", [("q", "d")]),
        ("q", ["d", "ee"], [("q", "d"), ("q", "ee")]),
        (["q"], ["d", "ee"], [("q", "d"), ("q", "ee")]),
        (["q", "p"], ["d", "ee"], [("q", "d"), ("p", "ee")]),
    ]
    running = await rank()
    for one, two, pairs in forms:
        before = len(running.engine.requests)
        body = (await running.post(path, {names[0]: one, names[1]: two})).json()
        told = texts(running, tokenizer)[before:]
        assert all(text.endswith(prompt_of(*pair)) for text, pair in zip(told, pairs, strict=True))
        assert [(item["index"], item["object"]) for item in body["data"]] == [(i, "score") for i in range(len(pairs))]
        for i, item in enumerate(body["data"]):
            assert item["score"] == pytest.approx(expected(running, before + i), abs=1e-7)
    assert (body["object"], body["model"]) == ("list", "models/scripted")


async def test_an_instruction_replaces_the_publisher_s(rank: Serve, tokenizer: Tokenizer) -> None:
    running = await rank()
    for instruction, told in (("Find birds <|im_end|>", "Find birds <|im_end|>"), ("", "Find it."), (None, "Find it.")):
        await running.post(RERANK, {"query": "bird", "documents": ["a"], "instruction": instruction})
        assert texts(running, tokenizer)[-1].endswith(prompt_of("bird", "a", told))
    end = tokenizer.added["<|im_end|>"]
    assert [request.prompt_ids.count(end) for request in running.engine.requests] == [2, 2, 2]


async def test_every_form_of_a_document_is_read(rank: Serve, tokenizer: Tokenizer) -> None:
    documents: list[Any] = [
        "a heron",
        {"text": "a heron"},
        {"content": "a heron"},
        {"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "heron"}]},
        {"image": URL, "text": "a heron"},
        {"content": [PICTURE, {"type": "text", "text": "a heron"}]},
        {"video": [URL, URL], "image": URL, "text": "x"},
    ]
    running = await rank()
    body = (await running.post(RERANK, {"query": {"image": URL}, "documents": documents})).json()
    told = {result["index"]: result.get("document") for result in body["results"]}
    assert [told[i] for i in range(7)] == [{"text": "a heron"}] * 4 + [None] * 3
    ids = [request.prompt_ids for request in running.engine.requests]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert ids[4] == ids[5]
    assert [len(request.items) for request in running.engine.requests] == [1, 1, 1, 1, 2, 2, 3]
    assert [item.kind for item in running.engine.requests[6].items] == ["image", "video", "image"]
    assert running.loader.num_held == 0


async def test_documents_alone_may_stand_without_a_list(rank: Serve) -> None:
    running = await rank()
    asked = {"query": "bird", "documents": {"content": [PICTURE]}}
    (result,) = (await running.post(RERANK, asked)).json()["results"]
    assert result["index"] == 0
    assert running.engine.requests[0].prompt_ids.count(IMAGE) == running.loader.num_tokens


async def test_rates_are_those_of_all_videos_of_a_call(rank: Serve) -> None:
    running = await rank()
    video = {"video": [URL, URL]}
    asked = {"query": video, "documents": [video, video], "mm_processor_kwargs": {"fps": [1, 2, 4]}}
    assert (await running.post(RERANK, asked)).status_code == 200
    assert {ref.fps for ref in running.loader.loaded} == {1, 2, 4}
    asked["mm_processor_kwargs"] = {"fps": [1, 2]}
    error = (await running.post(RERANK, asked)).json()["error"]
    assert error["param"] == "mm_processor_kwargs.fps"


async def test_media_of_all_documents_count_together(rank: Serve) -> None:
    running = await rank(max_items={"image": 3})
    asked = {"query": {"image": URL}, "documents": [{"image": URL}, "a", {"image": URL}]}
    assert (await running.post(RERANK, asked)).status_code == 200
    error = (await running.post(RERANK, {**asked, "documents": [{"image": URL}] * 3})).json()["error"]
    assert error["param"] == "documents"
    assert "hold 4 images, the limit is 3" in error["message"]


async def test_long_documents_lose_their_ends(rank: Serve, form: ScoreForm, tokenizer: Tokenizer) -> None:
    running = await rank()
    whole = {"query": "bird", "documents": ["zq" * 40]}
    await running.post(RERANK, whole)
    await running.post(RERANK, {**whole, "truncate_prompt_tokens": 210, "truncation_side": "right"})
    full, cut = [request.prompt_ids for request in running.engine.requests]
    assert cut == [*full[:210], *form.ending]
    assert len(cut) < len(full)


async def test_a_document_that_is_too_long_is_named(rank: Serve) -> None:
    running, long = await rank(), "reed " * 5000
    for route, asked, where in (
        (RERANK, {"query": "q", "documents": ["a", long]}, "documents[1]"),
        (RERANK, {"query": "q", "documents": [{"content": [{"type": "text", "text": long}]}]}, "documents[0]"),
        ("/v1/score", {"text_1": ["q", "r"], "text_2": ["a", long]}, "text_2[1]"),
    ):
        error = (await running.post(route, asked)).json()["error"]
        assert error["param"] == where


async def test_a_medium_that_fails_ends_the_call_and_leaves_nothing(rank: Serve) -> None:
    loader = ScriptedLoader(fails={"https://example.org/bad.png": MediaError("broken")})
    running = await rank(loader=loader)
    documents: list[Any] = ["a", {"image": URL}, {"image": "https://example.org/bad.png"}, {"image": URL}] * 4
    reply = await running.post(RERANK, {"query": {"image": URL}, "documents": documents})
    assert reply.status_code == 422
    assert running.engine.requests == []
    assert (loader.num_held, running.service.num_in_flight) == (0, 0)


async def test_a_medium_that_never_comes_is_not_waited_for_beyond_the_time(rank: Serve) -> None:
    loader = ScriptedLoader(hangs={"https://example.org/never.png"})
    running = await rank(loader=loader)
    documents: list[Any] = [{"image": URL}, {"image": "https://example.org/never.png"}] * 3
    reply = await running.post(RERANK, {"query": "q", "documents": documents, "timeout": 0.2})
    assert reply.status_code == 504
    assert (loader.num_held, running.service.num_in_flight) == (0, 0)


async def test_more_documents_than_places_wait_in_the_engine(rank: Serve) -> None:
    running = await rank(config={"max_queued_requests": 0})
    reply = await running.post(RERANK, {"query": "q", "documents": ["d"] * 2048, "top_n": 3})
    assert [result["index"] for result in reply.json()["results"]] == [0, 1, 2]
    assert running.service.num_in_flight == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (RERANK, {"documents": ["d"]}, "query"),
        (RERANK, {"query": "q"}, "documents"),
        (RERANK, {"query": "q", "documents": []}, "documents"),
        (RERANK, {"query": "q", "documents": ["d"] * 2049}, "documents"),
        (RERANK, {"query": "", "documents": ["d"]}, "query"),
        (RERANK, {"query": ["q"], "documents": ["d"]}, "query"),
        (RERANK, {"query": "q", "documents": ["d", ""]}, "documents[1]"),
        (RERANK, {"query": "q", "documents": [{}]}, "documents[0]"),
        (RERANK, {"query": "q", "documents": [{"content": []}]}, "documents[0]"),
        (RERANK, {"query": "q", "documents": [{"title": "d"}]}, "documents[0].title"),
        (RERANK, {"query": "q", "documents": [{"text": "d", "content": "d"}]}, "documents[0]"),
        (RERANK, {"query": "q", "documents": [{"content": [{"type": "audio"}]}]}, "documents[0].content[0].type"),
        (RERANK, {"query": "q", "documents": ["d", 1]}, "documents[1]"),
        (RERANK, {"query": "q", "documents": ["d"], "top_n": -1}, "top_n"),
        (RERANK, {"query": "q", "documents": ["d"], "truncation_side": "left"}, "truncation_side"),
        (RERANK, {"query": "q", "documents": ["d"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (RERANK, {"query": "q", "documents": ["d"], "temperature": 1}, "temperature"),
        (RERANK, {"query": "q", "documents": ["d"], "timeout": -1}, "timeout"),
        (RERANK, {"query": "q", "documents": ["q" * 4096]}, "documents[0]"),
        (SCORE, {}, "text_1"),
        (SCORE, {"text_1": "q"}, "text_2"),
        (SCORE, {"text_2": "q"}, "text_1"),
        (SCORE, {"text_1": "q", "data_2": "d"}, "text_1"),
        (SCORE, {"text_1": "q", "text_2": []}, "text_2"),
        (SCORE, {"text_1": [], "text_2": "d"}, "text_1"),
        (SCORE, {"text_1": ["q", "p"], "text_2": ["d"]}, "text_1"),
        (SCORE, {"text_1": ["q", "p"], "text_2": ["d", "e", "f"]}, "text_1"),
        (SCORE, {"text_1": ["q", ""], "text_2": ["d", "e"]}, "text_1[1]"),
    ],
)
async def test_what_is_wrong_is_named(rank: Serve, path: str, body: dict[str, Any], param: str) -> None:
    running = await rank()
    reply = await running.post(path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert running.engine.requests == []
    assert running.service.num_in_flight == 0


async def test_an_engine_that_fails_is_told(rank: Serve) -> None:
    running = await rank()
    running.engine.error = RuntimeError("broken")
    reply = await running.post(RERANK, {"query": "q", "documents": ["d", "e"]})
    assert reply.status_code == 500
    assert running.service.num_in_flight == 0


async def test_keys_are_asked_for(rank: Serve) -> None:
    running = await rank(config={"api_keys": ("secret",)})
    asked = {"query": "q", "documents": ["d"]}
    assert (await running.post(RERANK, asked)).status_code == 401
    reply = await running.post(RERANK, asked, headers={"authorization": "Bearer secret"})
    assert reply.status_code == 200


async def test_the_description_has_it_where_the_model_does(serve: Serve, rank: Serve) -> None:
    for running, is_there in ((await rank(), True), (await serve(), False)):
        paths = (await running.get("/openapi.json")).json()["paths"]
        assert {path in paths for path in (*RERANK_PATHS, *SCORE_PATHS)} == {is_there}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (body, name)
        for body in (RerankBody, ScoreBody)
        for name, field in body.model_fields.items()
        if state_of(field) == "refused"
    ],
)
async def test_fields_that_are_not_served_are_refused_by_name(rank: Serve, body: Any, name: str) -> None:
    running = await rank()
    asked = {"query": "q", "documents": ["d"]} if body is RerankBody else {"text_1": "q", "text_2": "d"}
    path = RERANK if body is RerankBody else SCORE
    error = (await running.post(path, {**asked, name: {"some": "thing"}})).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", name)
    for note in (note for note in body.model_fields[name].metadata if isinstance(note, Only)):
        for value in (None, *note.neutral):
            assert (await running.post(path, {**asked, name: value})).status_code == 200


async def test_batches_ask_for_scores_too(rank: Serve, tmp_path: Path) -> None:
    running = await rank(config={"files_path": str(tmp_path)})
    asked = {RERANK: {"query": "q", "documents": DOCUMENTS}, SCORE: {"text_1": "q", "text_2": DOCUMENTS}}
    for path, body in asked.items():
        line = json.dumps({"custom_id": "a", "method": "POST", "url": path, "body": body}).encode()
        sent = await running.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", line)})
        begin = {"input_file_id": sent.json()["id"], "endpoint": path, "completion_window": "24h"}
        reply = await running.post("/v1/batches", begin)
        while (batch := (await running.get(f"/v1/batches/{reply.json()['id']}")).json())["status"] != "completed":
            assert batch["status"] in ("validating", "in_progress", "finalizing"), batch
            await asyncio.sleep(0.01)
        told = json.loads((await running.get(f"/v1/files/{batch['output_file_id']}/content")).text)
        answer = told["response"]["body"]
        assert len(answer["results" if path == RERANK else "data"]) == 3
        assert batch["usage"]["input_tokens"] == answer["usage"]["prompt_tokens"]
