"""Requests that are answered with a score: one number of the float32 state, whoever runs the steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.models import loading
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.engine.card_runner import make_card_runner
from tests.engine.parallel.test_ranks import config_of
from tests.engine.runners import RUNNERS
from tests.engine.test_cards_parity import plain_torch
from tests.engine.test_parity import Family, Prompt, mixed_prompts
from tests.engine.test_vectors import vectors_of
from tests.rerankers import NO, YES, publish, untie

Publish = Callable[..., Path]


@pytest.fixture(scope="module")
def untied(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Publish:
    def make(arch: str) -> Path:
        return untie(publish(checkpoint(arch), tmp_path_factory.mktemp("published") / arch))

    return make


def family_of(folder: Path, **options: Any) -> Family:
    return Family(folder, None, load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu", **options)))


def of_transformers(folder: Path) -> Family:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Family(folder, model.eval(), load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu")))


def row_of(folder: Path) -> np.ndarray:
    """The checkpoint's own."""
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    row: np.ndarray = (head[YES] - head[NO]).numpy()
    return row


def scores_of(engine: Engine, family: Family, prompts: dict[str, Prompt], *others: Any) -> dict[str, float]:
    found = vectors_of(engine, family, prompts, *others)
    assert {vector.shape for vector in found.values()} == {(1,)}
    return {name: float(vector[0]) for name, vector in found.items()}


def in_a_crowd(engine: Engine, family: Family) -> dict[str, float]:
    prompts = mixed_prompts(family)
    streams = [family.request(f"s-{name}", prompt, max_tokens=9) for name, prompt in prompts.items()]
    return scores_of(engine, family, prompts, *streams)


@pytest.mark.parametrize("runner", list(RUNNERS))
def test_scores_of_transformers_in_a_crowd(untied: Publish, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    monkeypatch.setattr("dashinfer_vlm.engine.engine.make_runner", RUNNERS[runner])
    if RUNNERS[runner] is make_card_runner:
        monkeypatch.setattr(loading, "choose_backend", plain_torch)
    family = of_transformers(untied("qwen3_vl"))
    found = in_a_crowd(family.engine(max_num_batched_tokens=48), family)
    for name, prompt in mixed_prompts(family).items():
        with torch.inference_mode():
            logits = family.reference(**family.inputs(prompt)).logits[0, -1]
        assert found[name] == pytest.approx((logits[YES] - logits[NO]).item(), abs=1e-4), name
    assert np.ptp(list(found.values())) > 0.5


def test_scores_of_two_ranks_are_those_of_one(untied: Publish) -> None:
    """The two rows belong to different ranks' halves of the head."""
    folder = untied("qwen2_5_vl")
    family = family_of(folder)
    exact = in_a_crowd(family.engine(), family)
    engine, _ = load_engine(config_of(folder, 2), lambda *_: None)
    try:
        assert in_a_crowd(engine, family) == pytest.approx(exact, abs=1e-4)
    finally:
        engine.close()


@pytest.mark.parametrize("quant_type", ["a8w8", "a16w4"])
def test_a_head_that_is_quantised_scores_by_its_own_numbers(untied: Publish, quant_type: str) -> None:
    folder = untied("qwen3")
    scoring = family_of(folder, quant_type=quant_type)
    prompts = {f"text{i}": scoring.prompt(9 + 8 * i, seed=i) for i in range(4)}
    found = scores_of(scoring.engine(), scoring, prompts)
    (folder / "modules.json").write_text('[{"type": "Transformer"}]')
    embedding = family_of(folder, quant_type=quant_type)
    for name, vector in vectors_of(embedding.engine(), embedding, prompts).items():
        assert found[name] == pytest.approx(float(vector @ row_of(folder)), abs=1e-5), name
