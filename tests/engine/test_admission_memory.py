"""Memory is budgeted: embeddings of running sequences are bounded, an item beyond the encoder's memory is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import memory
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.memory import (
    EMBEDDING_HEADROOM_BYTES,
    MIN_ITEM_PATCHES,
    max_item_patches,
    max_pinned_tokens,
)
from dashinfer_vlm.errors import MediaTooLargeError
from dashinfer_vlm.models.base import embedding_row_bytes
from dashinfer_vlm.request import Item, Request
from tests.engine.scripted_model import VOCAB, ScriptedModel, expected
from tests.engine.test_engine import greedy, image, make_engine, run, tokens
from tests.searching import searched


def engine_for(max_tokens: int) -> Engine:
    """One whose running sequences may hold that many visual tokens, and which keeps none otherwise."""
    engine = make_engine(num_blocks=256, vision_cache_gib=0.0)
    engine.scheduler.wanted.max_tokens = max_tokens
    return engine


def asks(name: str, *fills: int, num_tokens: int = 6) -> tuple[Request, list[int]]:
    """A request with a picture for each of `fills`, and its answer."""
    prompt, values, items = [1], [1.0], []
    for fill in fills:
        items.append(image(len(prompt), num_tokens, fill))
        prompt += [VOCAB] * num_tokens + [2]
        values += [8.0 * fill] * num_tokens + [2.0]
    return Request(id=name, prompt_ids=prompt, params=greedy(3), items=tuple(items)), expected(values, 3)


def num_pinned_tokens(engine: Engine) -> int:
    return sum(engine.scheduler.wanted.rows.values())


def test_sequences_wait_until_the_embeddings_of_others_are_used() -> None:
    engine = engine_for(12)
    wanted = {}
    for n in range(5):
        request, answer = asks(f"r{n}", n + 1)
        engine.add(request)
        wanted[request.id] = answer
    engine.scheduler.schedule()
    assert [sequence.id for sequence in engine.scheduler.running] == ["r0", "r1"]
    got: dict[str, list[int]] = {name: [] for name in wanted}
    while engine.has_work():
        for output in engine.step():
            got[output.request_id] += output.token_ids
        assert num_pinned_tokens(engine) <= 12
    assert got == wanted
    engine.scheduler.check_integrity()


def test_a_lone_sequence_runs_whatever_it_needs() -> None:
    request, answer = asks("large", 1, 2, 3)
    assert tokens(run(engine_for(1), request)["large"]) == answer


def test_one_that_needs_more_than_all_room_waits_for_no_stream_of_text() -> None:
    engine = engine_for(1)
    engine.add(Request(id="text", prompt_ids=[1, 2], params=greedy(50)))
    engine.step()
    engine.add(asks("large", 1)[0])
    engine.scheduler.schedule()
    assert [sequence.id for sequence in engine.scheduler.running] == ["text", "large"]


def test_one_picture_of_many_sequences_counts_once() -> None:
    engine = engine_for(6)
    for n in range(8):
        engine.add(asks(f"r{n}", 7)[0])
    engine.scheduler.schedule()
    assert len(engine.scheduler.running) == 8


def test_ready_made_embeddings_need_no_room() -> None:
    engine = engine_for(6)
    for n in range(3):
        item = Item(
            kind="image", start=1, num_tokens=4, content_hash=bytes([n]) * 32, embedding=torch.full((4, 1), float(n))
        )
        engine.add(Request(id=f"r{n}", prompt_ids=[1, *[VOCAB] * 4, 2], params=greedy(2), items=(item,)))
    engine.scheduler.schedule()
    assert len(engine.scheduler.running) == 3


def test_a_prefix_hit_behind_the_pictures_needs_no_room() -> None:
    engine = engine_for(6)
    request, _ = asks("first", 5)
    longer = replace(request, prompt_ids=[*request.prompt_ids, 9, 9, 9, 9, 9, 9])
    run(engine, longer)
    engine.add(asks("other", 6)[0])
    engine.add(replace(longer, id="again"))
    engine.scheduler.schedule()
    assert [sequence.id for sequence in engine.scheduler.running] == ["other", "again"]


@searched(60)
@given(
    fills=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True), min_size=1, max_size=8),
    room=st.integers(0, 30),
)
def test_any_room_answers_everyone_right_and_is_kept_to(fills: list[list[int]], room: int) -> None:
    engine = engine_for(room)
    wanted = {}
    for n, each in enumerate(fills):
        request, answer = asks(f"r{n}", *each)
        engine.add(request)
        wanted[request.id] = answer
    largest = 6 * max(len(each) for each in fills)
    got: dict[str, list[int]] = {name: [] for name in wanted}
    while engine.has_work():
        for output in engine.step():
            got[output.request_id] += output.token_ids
        assert num_pinned_tokens(engine) <= max(room, largest)
    assert got == wanted


def test_the_room_is_the_caches_budget_and_some_more() -> None:
    model = ScriptedModel()
    assert embedding_row_bytes(model) == 8
    assert max_pinned_tokens(model, EngineConfig(vision_cache_gib=0)) == EMBEDDING_HEADROOM_BYTES // 8
    assert max_pinned_tokens(model, EngineConfig(vision_cache_gib=1)) == (EMBEDDING_HEADROOM_BYTES + 2**30) // 8


# The encoder's memory


def test_the_memory_for_one_item_is_what_the_kv_cache_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel()
    kv = model.kv(num_blocks=100)
    in_kv = sum(tensor.nbytes for tensor in (*kv.keys, *kv.values))
    monkeypatch.setattr(memory, "free_bytes", lambda device: in_kv + 1_000_000)
    assert max_item_patches(model, kv) == int(0.8 * 1_000_000 / model.encoder.bytes_per_patch)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert max_item_patches(model, kv) == MIN_ITEM_PATCHES


def test_an_item_beyond_the_encoders_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    monkeypatch.setattr(memory, "MIN_ITEM_PATCHES", 20)
    engine = make_engine()
    with pytest.raises(MediaTooLargeError, match="an item has 24 patches; the encoder has memory for 20"):
        engine.add(asks("large", 1)[0])
    assert not engine.has_work()
    request, answer = asks("small", 1, num_tokens=5)
    assert tokens(run(engine, request)["small"]) == answer
