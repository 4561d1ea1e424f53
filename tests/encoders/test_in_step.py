"""Choosing where the encoder runs, and what the stage in front of encoders elsewhere does with the engine's time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.clock import CardClock, HostClock
from dashinfer_vlm.encoders.elsewhere.crew import Crew, Outcome
from dashinfer_vlm.encoders.elsewhere.stage import WorkerEncoder
from dashinfer_vlm.encoders.in_step import InStepEncoder
from dashinfer_vlm.encoders.placement import config_of_worker
from dashinfer_vlm.encoders.queue import ItemQueue
from dashinfer_vlm.errors import ConfigError, EngineDeadError
from tests.encoders.told import TIMEOUT_S, Told, item
from tests.engine.scripted_model import ScriptedEncoder, ScriptedState


class WatchedCrew(Crew):
    """Notes how long it is asked to wait."""

    waits_s: list[float]

    def outcomes(self, wait_s: float) -> list[Outcome]:
        self.waits_s.append(wait_s)
        return super().outcomes(wait_s)


@pytest.fixture
def told() -> Told:
    """An encoder that holds its first batch until it may go on."""
    told = Told()
    told.may_encode.clear()
    return told


@pytest.fixture
def stage(told: Told) -> Iterator[WorkerEncoder]:
    queue = ItemQueue(EmbeddingCache(1 << 20))
    crew = WatchedCrew([told])
    crew.waits_s = []
    crew.wait_started(TIMEOUT_S)
    own = InStepEncoder(ScriptedEncoder(), queue, torch.device("cpu"), 1024)
    stage = WorkerEncoder(queue, crew, own, max_batch_patches=8)
    yield stage
    stage.close()


def waits(stage: WorkerEncoder) -> list[float]:
    assert isinstance(stage.crew, WatchedCrew)
    return stage.crew.waits_s


class Orphaned(ScriptedEncoder):
    """One whose other ranks have ended."""

    def run(self, state: ScriptedState, num_slices: int) -> None:
        raise EngineDeadError("rank 1 of the model was killed by signal SIGKILL")


def test_the_end_of_the_engine_is_no_fault_of_a_picture() -> None:
    stage = InStepEncoder(Orphaned(), ItemQueue(EmbeddingCache(1 << 20)), torch.device("cpu"), 1024)
    stage.request(item(0))
    with pytest.raises(EngineDeadError, match="rank 1"):
        stage.advance(1.0)


def test_nobody_waits_for_a_result_while_streams_do(stage: WorkerEncoder) -> None:
    for number in range(2):
        stage.request(item(number))
    stage.advance(0.02)
    assert stage.has_work()
    stage.advance(0.02)
    assert set(waits(stage)) == {0.0}
    stage.advance(0.5)
    assert 0 < waits(stage)[-1] <= 0.005


def test_a_full_batch_leaves_at_once_and_a_small_one_waits_for_company(stage: WorkerEncoder, told: Told) -> None:
    stage.request(item(0))
    stage.advance(0.0)
    assert not told.encoding.is_set()
    assert stage.queue.has_waiting()
    stage.request(item(1))
    stage.advance(0.0)
    assert told.encoding.wait(TIMEOUT_S)
    assert not stage.queue.has_waiting()
    told.may_encode.set()
    while stage.has_work():
        stage.advance(0.5)
    assert stage.stats.num_items_encoded_total == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_device": "cpu"}, "add --vision-workers 1"),
        ({"vision_threads": 2}, "add --vision-workers 1"),
        ({"cluster": "host:6379"}, "add --vision-workers 1"),
        ({"vision_workers": 1, "vision_device": "tpu"}, "must be cpu, cuda or cuda:N"),
        ({"vision_workers": 1, "vision_device": "cuda:1", "cluster": "host:6379"}, "must be cpu or cuda"),
        ({"vision_workers": -1}, "at least 0"),
    ],
)
def test_settings_that_nobody_would_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options).validate()


def test_each_worker_is_told_its_own_cores() -> None:
    config = EngineConfig(vision_workers=2, vision_threads=2, threads=3, cores="0-2,4-7")
    told = [config_of_worker(config, number) for number in range(2)]
    assert [(worker.threads, worker.cores) for worker in told] == [(2, "4,5"), (2, "6,7")]
    assert config_of_worker(EngineConfig(vision_workers=1, vision_threads=2), 0).cores is None


class Event:
    """Of a card whose work ends when the test says so."""

    now_s, done_s = 0.0, 0.0
    num_waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_s = Event.now_s

    def synchronize(self) -> None:
        Event.num_waits += 1
        Event.done_s = max(Event.done_s, self.at_s)

    def query(self) -> bool:
        return self.at_s <= Event.done_s

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at_s - self.at_s)


def test_a_card_is_waited_for_once_and_its_slices_are_learnt_when_they_have_ended() -> None:
    clock, told = CardClock(Event), []
    for slice_s in (0.1, 0.2, 0.2):
        clock.start()
        Event.now_s += slice_s
        told.append(clock.stop())
    assert told == [pytest.approx(0.1)] * 3
    assert Event.num_waits == 1
    Event.done_s = Event.now_s
    clock.start()
    clock.stop()
    assert clock.slice_s > 0.1


class TimedEncoder(ScriptedEncoder):
    """Each slice takes `slice_s` of a clock that only it moves."""

    def __init__(self, slice_s: float) -> None:
        super().__init__()
        self.slice_s = slice_s
        self.now_s = 0.0
        self.num_slices = 0

    def run(self, state: Any, num_slices: int) -> None:
        self.now_s += self.slice_s
        self.num_slices += num_slices


def in_step(slice_s: float, monkeypatch: pytest.MonkeyPatch) -> tuple[InStepEncoder, TimedEncoder]:
    """A stage with an item whose encoding never ends, after the first slice."""
    encoder = TimedEncoder(slice_s)
    stage = InStepEncoder(encoder, ItemQueue(EmbeddingCache(1 << 20)), torch.device("cpu"), 1024)
    monkeypatch.setattr("dashinfer_vlm.encoders.clock.time", SimpleNamespace(perf_counter=lambda: encoder.now_s))
    stage.request(item(1))
    stage.advance(slice_s)
    assert encoder.num_slices == 1
    return stage, encoder


@pytest.mark.parametrize("share", [0.25, 0.4, 0.75])
def test_a_budget_below_a_slice_is_saved_up_and_kept_on_average(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, encoder = in_step(0.1, monkeypatch)
    most = 0
    for _ in range(100):
        before = encoder.num_slices
        stage.advance(share * 0.1)
        most = max(most, encoder.num_slices - before)
    assert encoder.num_slices - 1 == pytest.approx(100 * share, abs=1)
    assert most == 1, "what was saved up is spent slice by slice"


def test_a_budget_of_some_slices_is_not_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, encoder = in_step(0.1, monkeypatch)
    stage.advance(0.35)
    assert encoder.num_slices == 1 + 3


def test_without_a_budget_nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, encoder = in_step(0.1, monkeypatch)
    stage.advance(0.0)
    assert encoder.num_slices == 1


def test_one_slow_slice_holds_the_encoder_up_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, encoder = in_step(0.1, monkeypatch)
    encoder.slice_s = 2.0
    stage.advance(0.1)
    encoder.slice_s = 0.1
    for _ in range(40):
        stage.advance(0.1)
    assert encoder.num_slices > 20


@pytest.mark.parametrize("is_card", [False, True])
def test_a_first_slice_that_took_a_second_starves_no_picture(is_card: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, encoder = in_step(1.0, monkeypatch)
    if is_card:
        stage._clock = CardClock(partial(DoneEvent, encoder))
        encoder.num_slices = 0
        stage.advance(1.0)
    encoder.slice_s = 0.001
    for _ in range(18):
        stage.advance(0.00075)
    assert encoder.num_slices >= 2, "the next slice says that the first one was unusual"
    for _ in range(100):
        stage.advance(0.00075)
    assert encoder.num_slices > 50


class DoneEvent:
    """Of a card that has done all that it was given, as the clock of an encoder says."""

    def __init__(self, encoder: TimedEncoder, *, enable_timing: bool) -> None:
        self.encoder = encoder

    def record(self) -> None:
        self.at_s = self.encoder.now_s

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: DoneEvent) -> float:
        return 1e3 * (end.at_s - self.at_s)


def test_slices_that_differ_count_as_what_they_take_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("dashinfer_vlm.encoders.clock.time", SimpleNamespace(perf_counter=lambda: now_s))
    clock = HostClock()
    for slice_s in (0.1, 0.1, 0.7, 0.1) * 4:
        clock.start()
        now_s += slice_s
        clock.stop()
    assert clock.slice_s == pytest.approx(0.25)
