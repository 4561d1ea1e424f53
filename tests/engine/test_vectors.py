"""Requests that are answered with a vector: beside tokens, in chunks, behind prefixes, and as `transformers` has it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.models import loading
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.request import Output, Request, SamplingParams
from tests.conftest import CheckpointMaker
from tests.engine.card_runner import make_card_runner
from tests.engine.parallel.test_ranks import config_of
from tests.engine.runners import RUNNERS
from tests.engine.scripted_model import ScriptedModel, expected
from tests.engine.test_cards_parity import kernels_for_cards, make_family, plain_torch
from tests.engine.test_parity import Family, Prompt, mixed_prompts

EMPTY = Prompt([], ())


@pytest.fixture(params=RUNNERS.values(), ids=list(RUNNERS))
def make_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("dashinfer_vlm.engine.engine.make_runner", request.param)

    def make(num_blocks: int = 64, **options: Any) -> Engine:
        model = ScriptedModel()
        return Engine(model, model.kv(num_blocks), EngineConfig(max_model_len=200, **options))

    return make


def wants(name: str, ids: list[int], **fields: Any) -> Request:
    return Request(id=name, prompt_ids=ids, wants_vector=True, **fields)


def says(name: str, ids: list[int], num_tokens: int) -> Request:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return Request(id=name, prompt_ids=ids, params=params)


def run(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    news: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            news[output.request_id].append(output)
    engine.scheduler.check_integrity()
    return news


def vector_of(outputs: list[Output]) -> np.ndarray:
    """That of a request that has ended well, with one output."""
    (only,) = outputs
    assert only.finish is not None
    assert (only.finish.reason, only.token_ids) == ("stop", ())
    return np.frombuffer(only.vector, "<f4")


def ids_of(seed: int, count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(1, 90, count)]


def test_a_vector_is_the_one_output(make_engine: Any) -> None:
    ids = ids_of(0, 11)
    outputs = run(make_engine(), wants("a", ids))["a"]
    assert vector_of(outputs).tolist() == expected(ids, 1)
    assert outputs[0].num_prompt_tokens == 11
    assert [span.stage for span in outputs[0].spans] == ["prefill_wait", "prefill"]


@pytest.mark.parametrize("max_num_batched_tokens", [None, 5])
def test_vectors_and_streams_share_their_steps(make_engine: Any, max_num_batched_tokens: int | None) -> None:
    engine = make_engine(max_num_batched_tokens=max_num_batched_tokens)
    prompts = {i: ids_of(i, 3 + 4 * i) for i in range(6)}
    requests = [says(f"s{i}", ids, 9) if i % 2 else wants(f"v{i}", ids) for i, ids in prompts.items()]
    news = run(engine, *requests)
    for i, ids in prompts.items():
        if i % 2:
            assert [token for output in news[f"s{i}"] for token in output.token_ids] == expected(ids, 9)
        else:
            assert vector_of(news[f"v{i}"]).tolist() == expected(ids, 1)
    assert engine.stats().num_output_tokens_total == 3 * 9


def test_the_prompt_of_a_vector_is_a_prefix_for_others_and_has_one(make_engine: Any) -> None:
    engine = make_engine()
    ids = ids_of(3, 20)
    run(engine, wants("a", ids))
    again, longer = run(engine, wants("b", ids))["b"], run(engine, says("c", [*ids, 7], 4))["c"]
    assert vector_of(again).tolist() == expected(ids, 1)
    assert again[0].num_cached_tokens == 16
    assert [token for output in longer for token in output.token_ids] == expected([*ids, 7], 4)
    assert longer[0].num_cached_tokens == 20
    assert engine.stats().num_cached_tokens_total == 36


def test_vectors_survive_preemption(make_engine: Any) -> None:
    engine = make_engine(num_blocks=50, max_num_batched_tokens=6)
    streams = [says(f"s{i}", ids_of(i, 10), 60) for i in range(3)]
    vectors = [wants(f"v{i}", ids_of(10 + i, 30)) for i in range(3)]
    news = run(engine, *streams, *vectors)
    for request in vectors:
        assert vector_of(news[request.id]).tolist() == expected(request.prompt_ids, 1)


def test_an_aborted_request_gives_no_vector(make_engine: Any) -> None:
    engine = make_engine(max_num_batched_tokens=4)
    engine.add(wants("a", ids_of(0, 30)))
    news = engine.step()
    engine.abort("a")
    while engine.has_work():
        news += engine.step()
    (only,) = news
    assert only.finish is not None
    assert (only.finish.reason, only.vector) == ("abort", b"")
    engine.scheduler.check_integrity()


def test_a_vector_that_is_not_finite_is_an_error(make_engine: Any) -> None:
    engine = make_engine()
    forward = engine.model.forward_with_vectors

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, vectors = forward(*args)
        return logits, torch.full_like(vectors, torch.nan)

    engine.model.forward_with_vectors = broken
    (only,) = run(engine, wants("a", [1, 2, 3]))["a"]
    assert only.finish is not None
    assert (only.finish.reason, only.vector) == ("error", b"")
    assert "not a number" in (only.finish.message or "")


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "qwen3", "qwen3_5"])
def family(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Family:
    from transformers import AutoModel

    folder = checkpoint(request.param)
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return Family(folder, reference, load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu")))


def prompts_of(family: Family) -> dict[str, Prompt]:
    if (family.folder / "preprocessor_config.json").exists():
        return mixed_prompts(family)
    return {f"text{i}": family.prompt(5 + 19 * i, seed=i) for i in range(5)}


def reference_vector(family: Family, prompt: Prompt) -> np.ndarray:
    """`last_hidden_state` of the base model, which is normed, at the last token."""
    with torch.inference_mode():
        states = family.reference(**family.inputs(prompt)).last_hidden_state
    vector: np.ndarray = states[0, -1].numpy()
    return vector


def vectors_of(engine: Engine, family: Family, prompts: dict[str, Prompt], *others: Request) -> dict[str, np.ndarray]:
    requests = [family.request(name, prompt, wants_vector=True) for name, prompt in prompts.items()]
    news = run(engine, *requests, *others)
    return {name: vector_of(news[name]) for name in prompts}


def assert_equal(found: dict[str, np.ndarray], family: Family, prompts: dict[str, Prompt]) -> None:
    for name, prompt in prompts.items():
        np.testing.assert_allclose(found[name], reference_vector(family, prompt), atol=1e-4, rtol=0, err_msg=name)


def test_vectors_of_transformers_alone(family: Family) -> None:
    prompts = prompts_of(family)
    found = [vectors_of(family.engine(), family, {name: prompt}) for name, prompt in prompts.items()]
    assert_equal({name: vector for one in found for name, vector in one.items()}, family, prompts)


@pytest.mark.parametrize("runner", ["at once", "one step late"])
def test_vectors_of_transformers_in_a_crowd(family: Family, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    monkeypatch.setattr("dashinfer_vlm.engine.engine.make_runner", RUNNERS[runner])
    assert_equal(vectors_in_a_crowd(family, prompts_of(family)), family, prompts_of(family))


def vectors_in_a_crowd(family: Family, prompts: dict[str, Prompt]) -> dict[str, np.ndarray]:
    streams = [family.request(f"s-{name}", prompt, max_tokens=12) for name, prompt in prompts.items()]
    return vectors_of(family.engine(max_num_batched_tokens=48), family, prompts, *streams)


@pytest.mark.parametrize("backend", [plain_torch, kernels_for_cards])
def test_vectors_of_the_runner_for_cards(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    if backend is kernels_for_cards:
        pytest.importorskip("triton")
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, which interprets, reports what a card does not
    prompts = {f"text{i}": replace(EMPTY, ids=ids_of(i, 5 + 7 * i)) for i in range(3)}
    whole = make_family(checkpoint, "qwen3")
    exact = vectors_of(whole.engine(), whole, prompts)
    monkeypatch.setattr(loading, "choose_backend", backend)
    monkeypatch.setattr("dashinfer_vlm.engine.engine.make_runner", make_card_runner)
    family = make_family(checkpoint, "qwen3")
    if backend is plain_torch:
        found = vectors_in_a_crowd(family, prompts)
    else:  # interpreted, which takes its time
        found = vectors_of(family.engine(max_num_batched_tokens=48, max_model_len=256), family, prompts)
    for name, vector in exact.items():
        np.testing.assert_allclose(found[name], vector, atol=1e-4, rtol=0, err_msg=name)


def test_vectors_of_transformers_in_chunks_and_behind_prefixes(family: Family) -> None:
    prompts = prompts_of(family)
    engine = family.engine(max_num_batched_tokens=7)
    assert_equal(vectors_of(engine, family, prompts), family, prompts)
    before = engine.stats().num_cached_tokens_total
    assert_equal(vectors_of(engine, family, prompts), family, prompts)
    assert engine.stats().num_cached_tokens_total > before


def test_vectors_do_not_depend_on_a_head_that_is_quantised(checkpoint: CheckpointMaker) -> None:
    """Weights of the layers are, so that only the norm can be compared: it is of length sqrt(hidden) over its gains."""
    folder = checkpoint("qwen3")
    model = load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu", quant_type="a8w8"))
    family = Family(folder, None, model)
    (vector,) = vectors_of(family.engine(), family, {"a": family.prompt(20)}).values()
    whole = load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))
    (exact,) = vectors_of(Family(folder, None, whole).engine(), family, {"a": family.prompt(20)}).values()
    assert 0.98 < vector @ exact / np.linalg.norm(vector) / np.linalg.norm(exact) < 1


@pytest.fixture
def two_ranks(checkpoint: CheckpointMaker) -> Iterator[Engine]:
    engine, _ = load_engine(config_of(checkpoint("qwen2_5_vl"), 2), lambda *_: None)
    yield engine
    engine.close()


def test_vectors_of_two_ranks_are_those_of_one(checkpoint: CheckpointMaker, two_ranks: Engine) -> None:
    family = make_family(checkpoint, "qwen2_5_vl")
    prompts = {name: prompt for name, prompt in mixed_prompts(family).items() if name in ("text2", "one1")}
    stream = family.request("s", family.prompt(12, seed=5), max_tokens=6)
    exact = vectors_of(family.engine(), family, prompts)
    found = vectors_of(two_ranks, family, prompts, stream)
    for name, vector in exact.items():
        np.testing.assert_allclose(found[name], vector, atol=1e-4, rtol=0, err_msg=name)
