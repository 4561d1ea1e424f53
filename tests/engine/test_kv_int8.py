"""An engine whose keys and values are stored in 8 bits: planning, and what reuses and recomputes them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.engine.memory import num_kv_blocks
from dashinfer_vlm.models.loading import allocate_kv
from dashinfer_vlm.request import Request, SamplingParams
from tests.conftest import CheckpointMaker


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint()


def load(folder: Path, **options: Any) -> tuple[Engine, EngineInfo]:
    settings = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "kv_cache_gib": 0.02, **options}
    config = EngineConfig(model=str(folder), kv_cache_dtype="int8", **settings)
    return load_engine(config, lambda stage, done, total: None)


def run(engine: Engine, *prompts: list[int]) -> list[list[int]]:
    tokens: dict[str, list[int]] = {str(n): [] for n in range(len(prompts))}
    for name, prompt in zip(tokens, prompts, strict=True):
        engine.add(Request(id=name, prompt_ids=prompt, params=SamplingParams(temperature=0, max_tokens=40)))
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    engine.scheduler.check_integrity()
    return list(tokens.values())


def prompt(first: int, length: int) -> list[int]:
    return [256 + (first * 31 + i * 7) % 144 for i in range(length)]


def test_a_row_takes_a_byte_per_number_and_four_for_its_scale(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine, info = load(folder, max_num_seqs=10_000)
    in_float32 = num_kv_blocks(engine.model, replace(engine.config, kv_cache_dtype="auto"))
    head_dim, kv = engine.model.text.head_dim, engine.runner.kv
    assert info.num_blocks == pytest.approx(in_float32 * 4 * head_dim / (head_dim + 4), rel=1e-2)
    assert 0.99 * 0.02 * 2**30 < sum(cache.nbytes for cache in (*kv.keys, *kv.values)) <= 0.02 * 2**30
    assert {cache.dtype for cache in (*kv.keys, *kv.values)} == {torch.int8}
    assert (info.dtype, info.kv_dtype) == ("float32", "int8")
    assert f"int8 KV cache: {info.num_blocks} blocks" in caplog.text


def test_a_prefix_that_is_found_gives_the_tokens_of_one_that_is_computed(folder: Path) -> None:
    engine, _ = load(folder)
    first = run(engine, prompt(1, 100))
    assert run(engine, prompt(1, 100)) == first
    assert engine.stats().num_cached_tokens_total >= 96


def test_sequences_that_are_preempted_and_computed_again_keep_their_tokens(folder: Path) -> None:
    prompts = [prompt(n, 60) for n in range(8)]
    ample, _ = load(folder, prefix_cache=False)
    tight = Engine(ample.model, allocate_kv(ample.model, 20, 16, torch.int8), ample.config)
    wanted = run(ample, *prompts)
    assert run(tight, *prompts) == wanted
    assert tight.stats().num_preemptions_total > 0
