"""One model in two processes: the tokens of one, and the end of both when one of them ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import distributed

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.elsewhere.worker import encode_at_once
from dashinfer_vlm.encoders.queue import grid
from dashinfer_vlm.engine import load
from dashinfer_vlm.engine.cards.calls import Call
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.host.loop import EngineLoop
from dashinfer_vlm.engine.host.wire import AskStats, Command, Event, Failed
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.engine.parallel.crew import RankProcesses
from dashinfer_vlm.engine.parallel.encoder import DealtEncoder, deal
from dashinfer_vlm.engine.parallel.meeting import leave
from dashinfer_vlm.errors import ConfigError, EngineDeadError
from dashinfer_vlm.models.base import EncoderState
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.request import Request
from tests.conftest import CheckpointMaker
from tests.engine.card_runner import with_spare_block
from tests.engine.scripted_model import ScriptedModel
from tests.engine.test_parity import Family, mixed_prompts, run

NAMES = ("text0", "text2", "one1", "two0")


def config_of(folder: Path, num_ranks: int) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        parallel_size=num_ranks,
        kv_cache_gib=0.01,
        max_model_len=512,
        max_num_batched_tokens=48,
        threads=1,
    )


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_5_vl")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Engine]:
    """An engine whose model two processes share; starting the other one takes seconds."""
    engine, _ = load_engine(config_of(folder, 2), lambda *_: None)
    yield engine
    engine.close()


def test_two_ranks_say_what_one_says(folder: Path, shared: Engine) -> None:
    family = Family(folder, None, load_model(config_of(folder, 1)))
    prompts = mixed_prompts(family)
    requests = [family.request(name, prompts[name], max_tokens=8) for name in NAMES]
    alone, _ = load_engine(config_of(folder, 1), lambda *_: None)
    assert isinstance(shared.model.encoder, DealtEncoder)
    assert shared.model.text.num_kv_heads < alone.model.text.num_kv_heads
    assert run(shared, *requests) == run(alone, *requests)
    assert shared.stats().num_items_encoded_total >= 2


def test_a_step_that_wants_no_token_is_shared_too(folder: Path, shared: Engine) -> None:
    """As of a prompt that nobody decodes beside, up to its last chunk."""
    family = Family(folder, None, load_model(config_of(folder, 1)))
    request = family.request("long", family.prompt(130), max_tokens=4)
    alone, _ = load_engine(config_of(folder, 1), lambda *_: None)
    assert run(shared, request) == run(alone, request)


class Silence:
    """A channel whose only command asks for the engine's state."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def receive(self, *, wait: bool) -> list[Command]:
        return [AskStats(1)]

    def send(self, event: Event) -> None:
        self.events.append(event)


@pytest.mark.timeout(120)
def test_pictures_that_the_first_rank_fails_to_finish_are_encoded_again(
    folder: Path, shared: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other one has made of its own is on its way by then."""
    encoder = shared.model.encoder
    assert isinstance(encoder, DealtEncoder)
    finish, left = encoder._own.finish, [torch.OutOfMemoryError()]

    def narrow(state: EncoderState) -> list[torch.Tensor]:
        if left:
            raise left.pop()
        return finish(state)

    monkeypatch.setattr(encoder._own, "finish", narrow)
    family = Family(folder, None, load_model(config_of(folder, 1)))
    request = family.request("two1", mixed_prompts(family)["two1"], max_tokens=8)
    alone, _ = load_engine(config_of(folder, 1), lambda *_: None)
    assert run(shared, request) == run(alone, request)
    assert not left
    assert shared.stats().num_encoder_retries_total == 2


class Silent:
    """Other ranks that do what they are told."""

    def call(self, call: Call, flat: NDArray[np.uint8]) -> None: ...
    def check(self, *, patience_s: float = 0.0) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError(), RuntimeError("a kernel failed")])
def test_a_call_that_fails_on_the_first_rank_ends_the_engine(failure: Exception) -> None:
    """The others are somewhere within it: what they sum next would be added to something else."""
    model = ScriptedModel()
    engine = Engine(model, with_spare_block(model.kv()), EngineConfig(max_model_len=200), followers=Silent())
    engine.add(Request(id="a", prompt_ids=[1, 2]))

    def broken(*args: object) -> None:
        raise failure

    model.forward = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineDeadError, match="the first rank"):
        engine.step()


class Unmovable(torch.Tensor):
    """Patches for which a device has no memory."""

    def to(self, *args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError


@pytest.mark.timeout(120)
def test_pictures_that_cannot_be_dealt_out_keep_nobody_waiting(folder: Path, shared: Engine) -> None:
    encoder = shared.model.encoder
    assert isinstance(encoder, DealtEncoder)
    family = Family(folder, None, load_model(config_of(folder, 1)))
    request = family.request("two0", mixed_prompts(family)["two0"], max_tokens=8)
    small, large = sorted(request.items, key=lambda item: item.work)
    patches, grids = [torch.as_tensor(item.patches) for item in (small, large)], [grid(small), grid(large)]
    with pytest.raises(torch.OutOfMemoryError):
        encoder.begin([patches[0].as_subclass(Unmovable), patches[1]], grids)
    made = encode_at_once(encoder, patches, grids)
    assert all(torch.isfinite(each).all() for each in made)


def test_a_process_that_shares_a_model_shares_no_second_one(folder: Path, shared: Engine) -> None:
    with pytest.raises(ConfigError, match="a process shares one model at a time"):
        load_engine(config_of(folder, 2), lambda *_: None)


def test_nccl_is_left_by_the_end_of_the_process_alone(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the other ranks, and for every graph that has it sum something."""
    monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")
    leave()
    assert distributed.is_initialized()


def test_the_death_of_a_rank_ends_the_engine(shared: Engine) -> None:
    processes = shared._followers
    assert isinstance(processes, RankProcesses)
    processes._processes[1].kill()
    processes._processes[1].wait()
    channel = Silence()
    EngineLoop(shared, channel).run()
    last = channel.events[-1]
    assert isinstance(last, Failed)
    assert "rank 1 of the model was killed by signal SIGKILL" in last.fault.message
    shared.close()


def test_what_a_rank_fails_with_is_what_the_start_fails_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before it says a word."""
    monkeypatch.setattr(RankProcesses, "command", ("false",))
    processes = RankProcesses(config_of(folder, 2))
    with pytest.raises(EngineDeadError, match="rank 1 of the model ended with status 1"):
        processes.wait_loaded()
    processes.close()
    processes.close()


def test_a_model_that_cannot_be_shared_is_refused_and_leaves_no_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[RankProcesses] = []

    class Sleeping(RankProcesses):
        command = ("sleep", "100")

        def __init__(self, config: EngineConfig) -> None:
            super().__init__(config)
            started.append(self)

    monkeypatch.setattr(load, "RankProcesses", Sleeping)
    with pytest.raises(ConfigError, match="--parallel-size 7 does not divide the model's 4 attention heads"):
        load_engine(replace(config_of(folder, 1), parallel_size=7), lambda *_: None)
    assert {process.wait() for process in started[0]._processes.values()} == {-signal.SIGKILL}


def test_pictures_are_dealt_to_who_has_least() -> None:
    assert deal([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]
    assert deal([5], 3) == [[0], [], []]
    assert deal([3, 3], 2) == [[0], [1]]
