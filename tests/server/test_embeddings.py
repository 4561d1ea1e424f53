"""`/v1/embeddings` over a real socket, by OpenAI's client and by hand."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.frontend.schema import Only, state_of
from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.frontend.vectors import NO_VECTORS, VectorForm
from dashinfer_vlm.server.embeddings import EmbeddingBody
from tests.frontend.scripted import vector_of
from tests.server.conftest import Running, Serve
from tests.tokens import VOCAB

Client = Callable[..., AsyncOpenAI]
PATH = "/v1/embeddings"
END = 260
TEXT = VectorForm(ending=(END,))
TURNS = VectorForm(is_conversation=True, instruction="Represent it.", ending=(END,))
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


def expected(running: Running, index: int, dimensions: int | None = None) -> np.ndarray:
    """The vector of the engine's request `index`."""
    state = np.frombuffer(vector_of(running.engine.requests[index]), "<f4").astype(np.float64)[:dimensions]
    vector: np.ndarray = (state / np.linalg.norm(state)).astype(np.float32)
    return vector


@pytest.mark.parametrize("dimensions", [None, 2])
async def test_openai_client_gets_unit_vectors(
    serve: Serve, openai_client: Client, tokenizer: Tokenizer, dimensions: int | None
) -> None:
    running = await serve(vectors=TEXT)
    more: dict[str, Any] = {} if dimensions is None else {"dimensions": dimensions}
    reply = await openai_client(running).embeddings.create(model="model", input=["hello", "a heron"], **more)
    assert [item.index for item in reply.data] == [0, 1]
    for i, item in enumerate(reply.data):
        np.testing.assert_array_equal(np.array(item.embedding, np.float32), expected(running, i, dimensions))
        assert len(item.embedding) == (dimensions or 128)
        assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-6)
    asked = [request.prompt_ids for request in running.engine.requests]
    assert asked == [[*tokenizer.encode_text(text), END] for text in ("hello", "a heron")]
    assert all(request.wants_vector for request in running.engine.requests)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, asked))


async def test_both_encodings_say_the_same(serve: Serve) -> None:
    running = await serve(vectors=TEXT)
    told = {
        encoding: (await running.post(PATH, {"input": "q", "encoding_format": encoding})).json()
        for encoding in ("float", "base64")
    }
    packed = np.frombuffer(base64.b64decode(told["base64"]["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(np.array(told["float"]["data"][0]["embedding"], np.float32), packed)
    body = (await running.post(PATH, {"input": "q"})).json()
    assert body["data"] == told["float"]["data"]
    assert (body["object"], body["data"][0]["object"], body["model"]) == ("list", "embedding", "models/scripted")


async def test_inputs_of_every_form_are_answered_in_order(serve: Serve) -> None:
    running = await serve(vectors=TEXT)
    q, z = 80, 89
    forms: list[tuple[Any, list[list[int]]]] = [
        ("q", [[q, END]]),
        (["q", "z"], [[q, END], [z, END]]),
        ([q, z], [[q, z]]),
        ([[q], [z, z]], [[q], [z, z]]),
    ]
    for sent, ids in forms:
        before = len(running.engine.requests)
        body = (await running.post(PATH, {"input": sent})).json()
        assert [request.prompt_ids for request in running.engine.requests[before:]] == ids
        assert [item["index"] for item in body["data"]] == list(range(len(ids)))
        for i, item in enumerate(body["data"]):
            np.testing.assert_array_equal(np.array(item["embedding"], np.float32), expected(running, before + i))
    await running.post(PATH, {"input": "q", "add_special_tokens": False})
    assert running.engine.requests[-1].prompt_ids == [q]


async def test_a_text_is_a_turn_where_the_model_was_trained_so(
    serve: Serve, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    running = await serve(vectors=TURNS)
    messages = [{"role": "system", "content": "Represent it."}, {"role": "user", "content": "a heron <|im_end|>"}]
    await running.post(PATH, {"input": messages[1]["content"]})
    await running.post(PATH, {"messages": messages[1:]})
    await running.post(PATH, {"messages": messages})
    await running.post("/v1/chat/completions", {"messages": messages})
    told, *others, chat = [request.prompt_ids for request in running.engine.requests]
    assert told == [*chat, END]
    assert others == [told, told]
    assert tokenizer.decode(told, skip_special=False).endswith("<|im_start|>assistant\n" + tokenizer.decode([END]))


async def test_an_open_last_turn_is_what_vllm_s_example_sends(serve: Serve) -> None:
    running = await serve(vectors=TURNS)
    turns: list[dict[str, Any]] = [{"role": "user", "content": "a heron"}]
    await running.post(PATH, {"messages": turns})
    open_turn = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    await running.post(
        PATH, {"messages": [*turns, open_turn], "continue_final_message": True, "add_special_tokens": True}
    )
    await running.post(PATH, {"messages": turns, "add_generation_prompt": False})
    first, second, closed = [request.prompt_ids for request in running.engine.requests]
    assert first == second
    assert len(closed) < len(first)


async def test_a_conversation_with_a_picture_is_one_vector(serve: Serve) -> None:
    running = await serve(vectors=TURNS)
    content = [IMAGE, {"type": "text", "text": "a heron"}]
    body = (await running.post(PATH, {"messages": [{"role": "user", "content": content}], "dimensions": 3})).json()
    (request,) = running.engine.requests
    assert len(request.items) == 1
    np.testing.assert_array_equal(np.array(body["data"][0]["embedding"], np.float32), expected(running, 0, 3))
    assert body["usage"]["prompt_tokens"] == len(request.prompt_ids)
    assert running.loader.num_held == 0


async def test_more_inputs_than_places_wait_in_the_engine(serve: Serve) -> None:
    running = await serve(vectors=TEXT, config={"max_queued_requests": 0})
    reply = await running.post(PATH, {"input": ["q"] * 2048, "dimensions": 1})
    assert reply.status_code == 200
    assert len(reply.json()["data"]) == 2048
    assert running.service.num_in_flight == 0


async def test_long_texts_are_cut_where_that_is_asked_for(serve: Serve) -> None:
    running = await serve(vectors=TEXT, engine={})
    for most, side, ids in ((3, None, [80, 89, 80]), (2, "right", [89, 80]), (-1, None, [89, 80] * 2 + [89, 80])):
        more: dict[str, Any] = {} if side is None else {"truncation_side": side}
        await running.post(PATH, {"input": "zqzqzq", "truncate_prompt_tokens": most, **more})
        assert running.engine.requests[-1].prompt_ids == [*ids, END]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": [VOCAB]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "x", "messages": [{"role": "user", "content": "x"}]}, "input"),
        ({"messages": []}, "messages"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 129}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "normalize": False}, "normalize"),
        ({"input": "x", "temperature": 1}, "temperature"),
        ({"input": "x", "timeout": -1}, "timeout"),
        ({"input": "q" * 4096}, "input"),
    ],
)
@pytest.mark.parametrize("vectors", [TEXT, TURNS], ids=["text", "turns"])
async def test_what_is_wrong_is_named(serve: Serve, vectors: VectorForm, body: dict[str, Any], param: str) -> None:
    running = await serve(vectors=vectors)
    reply = await running.post(PATH, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert running.engine.requests == []
    assert running.service.num_in_flight == 0


async def test_an_engine_that_fails_is_told(serve: Serve) -> None:
    running = await serve(vectors=TEXT)
    running.engine.error = RuntimeError("broken")
    reply = await running.post(PATH, {"input": ["q", "z"]})
    assert reply.status_code == 500
    assert running.service.num_in_flight == 0


async def test_metrics_count_its_prompts_and_no_tokens(serve: Serve) -> None:
    running = await serve(vectors=TEXT)
    await running.post(PATH, {"input": ["q", "z"]})
    lines = (await running.get("/metrics")).text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert values["dashinfer_prompt_tokens_total"] == 4
    assert values['dashinfer_choices_total{reason="stop"}'] == 2
    assert values["dashinfer_output_tokens_total"] == 0


async def test_keys_are_asked_for(serve: Serve, openai_client: Client) -> None:
    running = await serve(vectors=TEXT, config={"api_keys": ("secret",)})
    assert (await running.post(PATH, {"input": "q"})).status_code == 401
    reply = await openai_client(running, "secret").embeddings.create(model="model", input="q")
    assert len(reply.data) == 1


async def test_the_description_has_it_where_the_model_does(serve: Serve) -> None:
    for vectors, is_there in ((TEXT, True), (VectorForm(why_not="it is not"), False)):
        running = await serve(vectors=vectors)
        assert (PATH in (await running.get("/openapi.json")).json()["paths"]) is is_there


async def test_calls_side_by_side_are_told_apart(serve: Serve) -> None:
    running = await serve(vectors=TEXT)
    replies = await asyncio.gather(*(running.post(PATH, {"input": ["q" * (i + 1), "z"]}) for i in range(8)))
    firsts = [np.array(reply.json()["data"][0]["embedding"]) for reply in replies]
    assert len({round(float(vector[0] / vector[2])) for vector in firsts}) == 8


@pytest.mark.parametrize("name", [name for name, f in EmbeddingBody.model_fields.items() if state_of(f) == "refused"])
async def test_fields_that_are_not_served_are_refused_by_name(serve: Serve, name: str) -> None:
    running = await serve(vectors=TEXT)
    error = (await running.post(PATH, {"input": "q", name: {"some": "thing"}})).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", name)
    for note in (note for note in EmbeddingBody.model_fields[name].metadata if isinstance(note, Only)):
        for value in (None, *note.neutral):
            assert (await running.post(PATH, {"input": "q", name: value})).status_code == 200


async def test_batches_ask_for_vectors_too(serve: Serve, tmp_path: Path) -> None:
    lines = [{"custom_id": text, "method": "POST", "url": PATH, "body": {"input": text}} for text in ("q", "zz")]
    content = "\n".join(map(json.dumps, lines)).encode()
    for vectors in (TEXT, NO_VECTORS):
        running = await serve(vectors=vectors, config={"files_path": str(tmp_path / str(vectors is TEXT))})
        sent = await running.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        asked = {"input_file_id": sent.json()["id"], "endpoint": PATH, "completion_window": "24h"}
        reply = await running.post("/v1/batches", asked)
        if vectors is NO_VECTORS:
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "endpoint")
            continue
        while (batch := (await running.get(f"/v1/batches/{reply.json()['id']}")).json())["status"] != "completed":
            assert batch["status"] in ("validating", "in_progress", "finalizing"), batch
            await asyncio.sleep(0.01)
        told = (await running.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()
        answers = {row["custom_id"]: row["response"]["body"] for row in map(json.loads, told)}
        assert [len(answers[name]["data"][0]["embedding"]) for name in ("q", "zz")] == [128, 128]
        assert batch["usage"]["input_tokens"] == 5
