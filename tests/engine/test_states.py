"""Models whose layers keep a state of each sequence, through the engine: seats, memory, and whose state is whose."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.cli.logs import announce
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import memory
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.engine.memory import EMBEDDING_HEADROOM_BYTES, kv_block_bytes, num_kv_blocks, num_seats
from dashinfer_vlm.engine.states import PROMPT_TAIL
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.loading import allocate_kv, load_model
from dashinfer_vlm.request import Output, Request, SamplingParams
from tests.conftest import CheckpointMaker
from tests.engine.test_parity import run
from tests.engine.test_video_runs import Reference, request
from tests.models.driving import Prompt
from tests.models.qwen3_vl import CASES, image, prompt

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_5")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Prompt]:
    return {name: prompt(folder, *parts) for name, parts in CASES.items()}


def engine(folder: Path, model: Model, *, seats: int = 16, num_blocks: int = 256, **options: Any) -> Engine:
    config = EngineConfig(model=str(folder), **{"max_model_len": 1024, "dtype": "float32", **options})
    return Engine(model, allocate_kv(model, num_blocks, config.block_size, num_seats=seats), config)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"max_num_batched_tokens": 48}, 8), ({"seats": 3, "max_num_batched_tokens": 7}, 3), ({"seats": 1}, 1)],
    ids=str,
)
def test_pictures_and_videos_answer_as_alone_in_as_many_seats_as_there_are(
    folder: Path, model: Model, expected: Reference, cases: dict[str, Prompt], options: dict[str, Any], most: int
) -> None:
    core = engine(folder, model, **options)
    for name, case in cases.items():
        core.add(request(name, case))
    tokens: dict[str, list[int]] = {name: [] for name in cases}
    num_running = []
    while core.has_work():
        for output in core.step():
            tokens[output.request_id] += output.token_ids
        num_running.append(core.stats().num_running)
    assert tokens == {name: expected(case) for name, case in cases.items()}
    assert max(num_running) == most


def test_who_is_preempted_begins_again_in_whatever_seat_is_free(
    folder: Path, model: Model, expected: Reference, cases: dict[str, Prompt]
) -> None:
    core = engine(folder, model, seats=4, num_blocks=16, max_model_len=200)
    together = run(core, *(request(name, case) for name, case in cases.items()))
    assert core.stats().num_preemptions_total > 0
    assert together == {name: expected(case) for name, case in cases.items()}


def test_choices_of_one_prompt_have_states_of_their_own(folder: Path, model: Model, cases: dict[str, Prompt]) -> None:
    case = cases["one image"]

    def choices() -> list[Request]:
        sampled = [SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, seed=seed) for seed in range(4)]
        return [replace(request(f"{params.seed}", case), params=params) for params in sampled]

    core = engine(folder, model)
    together = run(core, *choices())
    assert together == {each.id: run(engine(folder, model), each)[each.id] for each in choices()}
    assert len({tuple(tokens) for tokens in together.values()}) == 4
    stats = core.stats()
    assert (stats.num_cached_tokens_total, stats.num_items_encoded_total) == (0, 1)


@pytest.mark.parametrize("kernels", ["reference", "generic"])
def test_the_next_turn_about_a_picture_begins_behind_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setenv("DASHINFER_KERNELS", kernels)
    model = load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))
    case = prompt(folder, 5, image(320, 256), 30)
    core = engine(folder, model)
    answer = [token for news in told(core, request("first", case)) for token in news.token_ids]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    ids = [*case.ids, *answer, *case.ids[-9:]]
    second = Request(id="second", prompt_ids=ids, items=case.items, params=params)
    before = core.stats().num_computed_tokens_total
    found, alone = told(core, second), told(engine(folder, model), second)
    num_cached = found[-1].num_cached_tokens
    assert num_cached == (len(case.ids) - PROMPT_TAIL) // 16 * 16, "its answer was too short for a state"
    assert num_cached > case.items[0].end
    assert core.stats().num_computed_tokens_total - before == len(ids) - num_cached + 23
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert [p.logprob for p in ours.logprobs] == pytest.approx([p.logprob for p in theirs.logprobs], abs=1e-4)


def told(core: Engine, asked: Request) -> list[Output]:
    """All that is said to a request, step by step."""
    core.add(asked)
    return [news for _ in iter(core.has_work, False) for news in core.step()]


def test_choices_about_a_long_picture_are_computed_once_and_stay_their_own(folder: Path, model: Model) -> None:
    case = prompt(folder, 5, image(320, 256), 30)

    def choices() -> list[Request]:
        sampled = [SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, seed=seed) for seed in range(4)]
        return [replace(request(f"{params.seed}", case), params=params) for params in sampled]

    core = engine(folder, model)
    together = run(core, *choices())
    assert together == {each.id: run(engine(folder, model), each)[each.id] for each in choices()}
    mark = (len(case.ids) - PROMPT_TAIL) // 16 * 16
    assert core.stats().num_cached_tokens_total == 3 * mark
    assert core.stats().num_computed_tokens_total == mark + 4 * (len(case.ids) - mark + 19)


def test_who_leaves_gives_the_seat_back(
    folder: Path, model: Model, expected: Reference, cases: dict[str, Prompt]
) -> None:
    core = engine(folder, model, seats=1)
    core.add(request("leaves", cases["one image"]))
    for _ in range(3):
        core.step()
    core.abort("leaves")
    case = cases["text only"]
    core.add(request("stays", case))
    tokens: list[int] = []
    while core.has_work():
        tokens += [token for output in core.step() if output.request_id == "stays" for token in output.token_ids]
    assert tokens == expected(case)


@pytest.mark.parametrize(
    ("gib", "max_num_seqs", "seats"),
    [(0.25, 128, 4 * 128), (0.0625, 1000, "half"), (0.001, 128, "half")],
    ids=["enough", "half of the memory", "little"],
)
def test_states_take_their_part_of_the_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch, gib: float, max_num_seqs: int, seats: int | str
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 30)
    config = EngineConfig(max_model_len=32000, kv_cache_gib=gib, max_num_seqs=max_num_seqs, dtype="float32")
    without = num_seats(model, replace(config, prefix_cache=False))
    assert without == min(max_num_seqs, int(gib * 1024 * MIB / 2 // model.text.state_bytes))
    assert model.text.delta_net is not None
    total, state = gib * 1024 * MIB, model.text.delta_net.state_bytes
    found = num_seats(model, config)
    assert found == (seats if seats != "half" else int(total / 2 // state))
    left = total - found * state - num_kv_blocks(model, config) * kv_block_bytes(model, config)
    assert 0 <= left < kv_block_bytes(model, config)


def test_on_a_card_they_take_their_part_of_what_steps_leave(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    free, reserved = 64 * MIB, 24 * MIB
    monkeypatch.setattr(memory, "free_bytes", lambda device: free + EMBEDDING_HEADROOM_BYTES)
    config = EngineConfig(max_model_len=32000, max_num_seqs=4000, vision_cache_gib=0, dtype="float32")
    state, total = model.text.state_bytes, free - reserved
    found = num_seats(model, config, reserved)
    assert found == int(total / 2 // state) > 1
    left = total - found * state - num_kv_blocks(model, config, reserved) * kv_block_bytes(model, config)
    assert 0 <= left < kv_block_bytes(model, config)


def test_there_is_always_a_seat(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    assert num_seats(model, EngineConfig(max_model_len=16)) == 1


def test_it_is_told_how_many_run_and_how_many_states_there_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    num_threads = torch.get_num_threads()
    config = EngineConfig(model=str(folder), device="cpu", kv_cache_gib=0.05, max_model_len=512, max_num_seqs=4000)
    with caplog.at_level(logging.INFO):
        core, info = load_engine(config, lambda *_: None)
        announce("model", info)
    torch.set_num_threads(num_threads)
    core.close()
    assert 1 < info.max_num_seqs == info.num_states < 4000
    assert f"{info.num_states} states, of sequences and saved ones, in 0.02 GiB" in caplog.text
    assert f"Each request has a state of 0.02 MiB; there is room for {info.num_states:,}, with those" in caplog.text
