"""A text model with states through the engine: its tokens are those of `transformers`, in a crowd, behind saved states,
with guesses and by two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.engine.parallel.test_ranks import config_of
from tests.engine.test_parity import Family, Prompt, run


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_next")


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Family(folder, reference, load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.mark.parametrize("guesses", [False, True])
def test_sequences_answer_in_a_crowd_as_alone(family: Family, guesses: bool) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1} if guesses else None
    engine = family.engine(max_num_batched_tokens=48, speculative_config=config)
    engine.scheduler.cost.fixed_s, engine.scheduler.cost.rate = 1.0, 0.0  # whatever these steps take, guess
    prompts = {str(i): family.prompt(9 + 30 * i, seed=i) for i in range(4)}
    got = run(engine, *(family.request(name, prompt) for name, prompt in prompts.items()))
    assert got == {name: family.expected(prompt) for name, prompt in prompts.items()}
    assert (engine.stats().num_accepted_draft_tokens_total > 0) == guesses


def test_a_second_turn_goes_on_from_a_saved_state(family: Family) -> None:
    engine, first = family.engine(), family.prompt(150)
    answer = run(engine, family.request("a", first))["a"]
    second = Prompt([*first.ids, *answer, *family.prompt(20, seed=1).ids], ())
    assert run(engine, family.request("b", second))["b"] == family.expected(second)
    assert engine.stats().num_cached_tokens_total >= 128


def test_two_ranks_deal_out_heads_and_channels(family: Family) -> None:
    shared, _ = load_engine(config_of(family.folder, 2), lambda *_: None)
    try:
        assert 2 * shared.model.text.state_bytes == family.model.text.state_bytes
        prompts = {str(i): family.prompt(9 + 30 * i, seed=i) for i in range(3)}
        got = run(shared, *(family.request(name, prompt) for name, prompt in prompts.items()))
    finally:
        shared.close()
    assert got == {name: family.expected(prompt) for name, prompt in prompts.items()}
