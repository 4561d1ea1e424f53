"""Videos in several runs through the engine: one encoding, the tokens of `transformers`, however they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.loading import allocate_kv, load_model
from dashinfer_vlm.request import Request, SamplingParams
from tests.conftest import CheckpointMaker
from tests.encoders.redis_server import RedisServer, start_redis
from tests.engine.test_parity import run
from tests.models import driving
from tests.models.driving import Prompt
from tests.models.qwen3_vl import CASES, image, prompt, video

NUM_TOKENS = 24
FILM = (6, video(96, 64, 6), 8)
MIXED = (2, video(64, 64, 4, seed=5), 3, image(96, 64, 6), video(32, 96, 3, 1.0, 7), 5)


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_vl")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))


class Reference:
    """What `transformers` answers, each prompt once."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = driving.load_hf(folder)
        self.known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, case: Prompt) -> list[int]:
        key = tuple(case.ids)
        if key not in self.known:
            inputs = {name: value for name, value in case.hf_inputs().items() if name != "second_per_grid_ts"}
            with torch.no_grad():
                out = self.model.generate(
                    **inputs, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1
                )
            self.known[key] = out[0, len(case.ids) :].tolist()
        return self.known[key]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Reference:
    return Reference(folder)


def engine(folder: Path, model: Model, **options: Any) -> Engine:
    num_blocks = options.pop("num_blocks", 256)
    config = EngineConfig(model=str(folder), **{"max_model_len": 1024, "dtype": "float32", **options})
    return Engine(model, allocate_kv(model, num_blocks, config.block_size), config)


def request(name: str, case: Prompt) -> Request:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return Request(id=name, prompt_ids=case.ids, items=case.items, params=params)


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Prompt]:
    return {name: prompt(folder, *parts) for name, parts in CASES.items()}


def test_a_video_is_encoded_once_for_all_of_its_runs(folder: Path, model: Model, expected: Reference) -> None:
    case, core = prompt(folder, *FILM), engine(folder, model)
    assert [item.first_row for item in case.items] == [0, 6, 12]
    assert run(core, request("a", case))["a"] == expected(case)
    stats = core.stats()
    assert (stats.num_items_encoded_total, stats.embedding_misses_total, stats.embedding_hits_total) == (1, 1, 0)
    run(core, request("b", case))
    assert core.stats().num_items_encoded_total == 1


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 7}, {"vision_cache_gib": 0.0}, {}], ids=str)
def test_each_answers_in_a_batch_as_alone(
    folder: Path, model: Model, expected: Reference, cases: dict[str, Prompt], options: dict[str, Any]
) -> None:
    core = engine(folder, model, **options)
    together = run(core, *(request(name, case) for name, case in cases.items()))
    assert together == {name: expected(case) for name, case in cases.items()}
    assert core.stage.cache.num_bytes == 0 or options.get("vision_cache_gib") != 0.0


def test_a_preempted_sequence_answers_as_if_undisturbed(
    folder: Path, model: Model, expected: Reference, cases: dict[str, Prompt]
) -> None:
    core = engine(folder, model, num_blocks=16, max_model_len=200)
    together = run(core, *(request(name, case) for name, case in cases.items()))
    assert core.stats().num_preemptions_total > 0
    assert together == {name: expected(case) for name, case in cases.items()}


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_two_turns_with_the_prefix_cache_on_and_off(
    folder: Path, model: Model, expected: Reference, prefix_cache: bool
) -> None:
    core = engine(folder, model, prefix_cache=prefix_cache)
    first = prompt(folder, *MIXED)
    answer = run(core, request("a", first))["a"]
    assert answer == expected(first)
    tail = prompt(folder, 3, video(64, 32, 4, seed=8), 4, seed=9)
    moved = tuple(replace(item, start=item.start + len(first.ids) + len(answer)) for item in tail.items)
    second = Prompt(first.ids + answer + tail.ids, first.items + moved, first.processor)
    assert run(core, request("b", second))["b"] == expected(second)
    assert (core.stats().num_cached_tokens_total > 0) == prefix_cache
    assert core.stats().num_items_encoded_total == 4


def test_a_prefix_that_ends_inside_a_video_is_found(folder: Path, model: Model, expected: Reference) -> None:
    core, case = engine(folder, model, block_size=4), prompt(folder, *FILM)
    run(core, request("a", case))
    other = prompt(folder, *FILM[:2], 9, seed=4)
    changed = Prompt(case.ids[:40] + other.ids[40:], other.items, other.processor)
    cached = core.stats().num_cached_tokens_total
    assert run(core, request("b", changed))["b"] == expected(changed)
    assert core.stats().num_cached_tokens_total > cached


def test_the_same_frames_at_other_times_share_the_encoding_and_not_the_prefix(
    folder: Path, model: Model, expected: Reference
) -> None:
    core = engine(folder, model)
    fast, slow = (prompt(folder, 4, video(64, 64, 4, fps), 6) for fps in (2.0, 1.0))
    for name, case in (("a", fast), ("b", slow)):
        assert run(core, request(name, case))[name] == expected(case)
    assert core.stats().num_items_encoded_total == 1


@pytest.fixture
def workers(folder: Path, model: Model) -> Iterator[Engine]:
    core = engine(folder, model, vision_workers=1, threads=1, vision_threads=1)
    yield core
    core.close()


def test_workers_give_the_same_tokens(workers: Engine, expected: Reference, folder: Path) -> None:
    case = prompt(folder, *MIXED)
    assert run(workers, request("a", case))["a"] == expected(case)
    assert workers.stats().num_items_encoded_elsewhere_total == 3


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    yield from start_redis(tmp_path)


def test_a_second_engine_finds_whole_videos_in_redis(
    folder: Path, model: Model, expected: Reference, redis: RedisServer
) -> None:
    case = prompt(folder, *MIXED)
    for number in range(2):
        core = engine(folder, model, vision_cache=redis.url)
        assert run(core, request("a", case))["a"] == expected(case)
        assert core.stats().num_items_encoded_total == (0 if number else 3)
        while core.stats().shared_cache_written_bytes_total == 0 and not number:
            core.step()
        core.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items[:-1], "the last item ends with row 12 of 18"),
        (lambda items: items[1:], "begins with row 6 of its embedding, not 0"),
        (lambda items: (items[0], items[2]), "begins with row 12 of its embedding, not 6"),
        (lambda items: (items[0], replace(items[1], content_hash=b"x" * 32), items[2]), "begins with row 6"),
        (lambda items: (*items[:2], replace(items[2], num_tokens=7)), "more placeholders than its embedding's 18 rows"),
    ],
)
def test_parts_that_do_not_follow_each_other_are_refused(folder: Path, model: Model, change: Any, message: str) -> None:
    case = prompt(folder, *FILM)
    with pytest.raises(InvalidRequestError, match=message):
        engine(folder, model).add(request("a", Prompt(case.ids, change(case.items), case.processor)))
