"""Engines that share a real Redis: the same answers, nothing encoded twice, and nothing lost when it dies."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.models.identity import encoder_identity
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.request import Request
from tests.conftest import CheckpointMaker
from tests.encoders.redis_server import RedisServer, start_redis
from tests.engine.test_parity import Family, Prompt, picture, run

NUM_TOKENS = 12
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def family(checkpoint: CheckpointMaker) -> Family:
    folder = checkpoint("qwen2_vl")
    return Family(folder, None, load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu")))


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    yield from start_redis(tmp_path)


@pytest.fixture
def make_engine(family: Family) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(url: str | None, **options: object) -> Engine:
        made.append(family.engine(vision_cache=url, prefix_cache=False, **{"dtype": "float32"} | options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def pictures(family: Family, count: int) -> dict[str, Prompt]:
    """Prompts with a picture each, all different."""
    return {f"r{i}": family.prompt(3, picture(60 + 4 * i, 84, seed=i), 4, seed=i) for i in range(count)}


def requests(family: Family, prompts: dict[str, Prompt]) -> list[Request]:
    return [family.request(name, prompt, max_tokens=NUM_TOKENS) for name, prompt in prompts.items()]


def stored(redis: RedisServer, count: int) -> None:
    """Until so many embeddings have been written."""
    deadline = time.monotonic() + 60.0
    while redis.client.dbsize() < count:
        assert time.monotonic() < deadline, redis.client.dbsize()


def entries(redis: RedisServer) -> dict[bytes, bytes]:
    return {name: redis.client.get(name) for name in redis.client.scan_iter()}


def shared(stats: EngineStats) -> tuple[int, int]:
    return stats.shared_cache_hits_total, stats.shared_cache_misses_total


def test_a_second_engine_finds_everything_in_redis_and_says_the_same(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    asked = requests(family, pictures(family, 6))
    alone = run(make_engine(None), *asked)
    first, second = make_engine(redis.url), make_engine(redis.url)
    assert run(first, *asked) == alone
    stored(redis, 6)
    assert run(second, *asked) == alone
    assert first.stats().num_items_encoded_total == 6
    assert second.stats().num_items_encoded_total == 0
    assert (shared(first.stats()), shared(second.stats())) == ((0, 6), (6, 0))
    assert first.stats().shared_cache_written_bytes_total == second.stats().shared_cache_read_bytes_total > 0
    assert (second.stats().embedding_hits_total, second.stats().embedding_misses_total) == (0, 6)
    assert second.stats().shared_cache_errors_total == 0


def test_a_repeated_picture_is_found_in_memory_before_redis(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    engine = make_engine(redis.url)
    (asked,) = requests(family, pictures(family, 1))
    for name in "abc":
        run(engine, replace(asked, id=name))
    assert shared(engine.stats()) == (0, 1)
    assert (engine.stats().embedding_hits_total, engine.stats().embedding_misses_total) == (2, 1)


def test_one_picture_of_many_requests_is_asked_for_once(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    (asked,) = requests(family, pictures(family, 1))
    crowd = [replace(asked, id=f"c{i}") for i in range(16)]
    first, second = make_engine(redis.url), make_engine(redis.url)
    answers = run(first, *crowd)
    stored(redis, 1)
    assert len({tuple(tokens) for tokens in answers.values()}) == 1
    assert run(second, *crowd) == answers
    assert (shared(first.stats()), shared(second.stats())) == ((0, 1), (1, 0))
    assert (first.stats().num_items_encoded_total, second.stats().num_items_encoded_total) == (1, 0)
    assert (second.stats().embedding_hits_total, second.stats().embedding_misses_total) == (15, 1)


def test_it_serves_an_engine_that_keeps_nothing_in_memory(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    engine = make_engine(redis.url, vision_cache_gib=0.0)
    (asked,) = requests(family, pictures(family, 1))
    first = run(engine, replace(asked, id="a"))["a"]
    stored(redis, 1)
    assert run(engine, replace(asked, id="b"))["b"] == first
    assert engine.stats().num_items_encoded_total == 1
    assert engine.stats().embedding_bytes == 0


def test_damaged_values_are_encoded_again_and_replaced(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    asked = requests(family, pictures(family, 3))
    alone = run(make_engine(redis.url), *asked)
    stored(redis, 3)
    good = entries(redis)
    for name, value in good.items():
        redis.client.set(name, value[:100] + bytes([value[100] ^ 255]) + value[101:])
    engine = make_engine(redis.url)
    assert run(engine, *asked) == alone
    assert engine.stats().num_items_encoded_total == 3
    assert engine.stats().shared_cache_errors_total == 3
    engine.close()
    assert entries(redis) == good


def test_kill_of_redis_under_load_loses_no_request(family: Family, redis: RedisServer, make_engine: MakeEngine) -> None:
    asked = requests(family, pictures(family, 50))
    alone = run(make_engine(None), *asked)
    filler = make_engine(redis.url)
    run(filler, *asked[:25])
    stored(redis, 25)
    engine = make_engine(redis.url, max_num_seqs=8)  # in waves, so that most are asked for after the kill
    tokens: dict[str, list[int]] = {request.id: [] for request in asked}
    for request in asked:
        engine.add(request)
    ended = 0
    while engine.has_work():
        if ended >= 5 and engine.stats().shared_cache_errors_total == 0:
            redis.kill()
        for output in engine.step():
            assert output.finish is None or output.finish.reason == "length", output.finish
            ended += output.finish is not None
            tokens[output.request_id] += output.token_ids
    assert ended == 50
    assert tokens == alone
    stats = engine.stats()
    assert stats.shared_cache_hits_total >= 5
    assert stats.shared_cache_hits_total + stats.num_items_encoded_total == 50
    assert stats.shared_cache_errors_total >= 1
    engine.scheduler.check_integrity()


def test_a_frozen_redis_costs_misses_and_little_time(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    asked = requests(family, pictures(family, 20))
    start = time.monotonic()
    alone = run(make_engine(None), *asked)
    undisturbed_s = time.monotonic() - start
    redis.freeze()
    engine = make_engine(redis.url)
    start = time.monotonic()
    assert run(engine, *asked) == alone
    assert time.monotonic() - start < 3 * undisturbed_s + 5.0  # one time-out, not twenty; a busy machine has room
    assert shared(engine.stats()) == (0, 20)
    assert engine.stats().num_items_encoded_total == 20
    redis.thaw()


def test_an_aborted_request_leaves_no_question_behind(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    redis.freeze()
    engine = make_engine(redis.url)
    first, second = requests(family, pictures(family, 2))
    engine.add(first)
    engine.add(replace(first, id="twin"))
    engine.add(second)
    engine.step()
    for name in (first.id, "twin", second.id):
        engine.abort(name)
    while engine.has_work():
        engine.step()
    redis.thaw()
    engine.scheduler.check_integrity()
    engine.stage.cache.check_integrity()
    assert not engine.stage.cache.is_pinned(first.items[0].content_hash)
    assert engine.stats().num_items_encoded_total == 0


def test_an_answer_that_is_late_is_not_waited_for(
    family: Family, redis: RedisServer, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashinfer_vlm.encoders.shared.redis_cache.READ_TIMEOUT_S", 60.0)  # a server that trickles
    (asked,) = requests(family, pictures(family, 1))
    redis.freeze()
    engine = make_engine(redis.url)
    assert run(engine, asked)[asked.id]
    assert shared(engine.stats()) == (0, 1)
    assert engine.stats().num_items_encoded_total == 1
    redis.thaw()


def test_vision_workers_are_asked_only_for_what_redis_does_not_have(
    family: Family, redis: RedisServer, make_engine: MakeEngine
) -> None:
    asked = requests(family, pictures(family, 4))
    alone = run(make_engine(redis.url), *asked[:2])
    stored(redis, 2)
    engine = make_engine(redis.url, vision_workers=1)
    answers = run(engine, *asked)
    assert {name: answers[name] for name in alone} == alone
    assert shared(engine.stats()) == (2, 2)
    assert engine.stats().num_items_encoded_total == 2
    stored(redis, 4)


# Whose embeddings they are


def test_the_identity_follows_the_vits_weights_and_nothing_else(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    original = checkpoint("qwen2_vl")
    moved, tuned, other_text = (tmp_path / name for name in ("moved", "tuned", "other_text"))
    for folder in (moved, tuned, other_text):
        shutil.copytree(original, folder)
    _add_one(tuned / "model.safetensors", "visual.")
    _add_one(other_text / "model.safetensors", "model.")

    def identity(folder: Path, activations: torch.dtype = torch.float32, **options: object) -> bytes:
        return encoder_identity(EngineConfig(model=str(folder), **options), activations)  # type: ignore[arg-type]

    assert identity(original) == identity(moved) == identity(other_text)
    different = {
        identity(original),
        identity(tuned),
        identity(original, torch.bfloat16),
        identity(original, vision_engine="transformers"),
        identity(original, vision_quant_type="a8w8"),
        identity(original, dtype="float32"),
        identity(checkpoint("qwen2_5_vl")),
    }
    assert len(different) == 7


def _add_one(path: Path, prefix: str) -> None:
    """To one number of the first tensor with that prefix."""
    tensors = load_file(path)
    tensors[min(name for name in tensors if name.startswith(prefix))].view(-1)[-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
