"""Encoders in real child processes: the same answers as in the step, whatever happens to the processes."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.elsewhere import process
from dashinfer_vlm.encoders.elsewhere.process import ProcessEncoder
from dashinfer_vlm.encoders.elsewhere.stage import WorkerEncoder
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.shared_array import SharedFolder, shared_root
from tests.conftest import CheckpointMaker
from tests.encoders.asking import Answers, loaded, picture, plain, request, run

ROOT = Path(__file__).resolve().parents[2]
BAD_WORKER = "tests.encoders.bad_worker"
NUM_REQUESTS = 50
BOUND_S = 120.0
"""Alone on the machine it takes about a second."""


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Answers:
    """The 50 requests, encoded in the step."""
    with loaded(folder) as engine:
        return run(engine, [request(folder, str(i), picture(i)) for i in range(NUM_REQUESTS)])


def stage_of(engine: Engine) -> WorkerEncoder:
    assert isinstance(engine.stage, WorkerEncoder)
    return engine.stage


def pids(engine: Engine) -> list[int]:
    """Of the workers that live."""
    found = [encoder.pid for encoder in stage_of(engine).crew.encoders if isinstance(encoder, ProcessEncoder)]
    return [pid for pid in found if pid is not None]


def wait_for_end(pid: int, timeout_s: float = 20.0) -> None:
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([watch], [], [], timeout_s)[0], "the process did not end"
    os.close(watch)


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_same_tokens_as_the_step(checkpoint: CheckpointMaker, arch: str, num_workers: int) -> None:
    folder = checkpoint(arch)
    requests = [request(folder, str(i), picture(2 * i), picture(2 * i + 1)) for i in range(8)]
    with loaded(folder) as engine:
        expected = run(engine, requests)
    with loaded(folder, vision_workers=num_workers) as engine:
        assert run(engine, requests) == expected
        stats = engine.stats()
        assert stage_of(engine).own.seconds == 0, "the engine encoded itself"
    assert (stats.num_items_encoded_total, stats.num_items_encoded_elsewhere_total) == (16, 16)
    assert (stats.num_encoders, stats.num_encoder_retries_total) == (num_workers, 0)


def test_a_worker_killed_under_fifty_requests_costs_no_answer(folder: Path, expected: Answers) -> None:
    with loaded(folder, vision_workers=2) as engine:
        victim = pids(engine)[0]
        os.kill(victim, signal.SIGSTOP)  # so that it surely holds a batch when it dies
        stage = stage_of(engine)
        killed: list[int] = []

        def kill_once_the_other_is_through() -> None:
            if not killed and stage.stats.num_items_encoded_total:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        requests = [request(folder, str(i), picture(i)) for i in range(NUM_REQUESTS)]
        start = time.monotonic()
        assert run(engine, requests, after_step=kill_once_the_other_is_through) == expected
        assert time.monotonic() - start < BOUND_S
        stats = engine.stats()
        assert killed
        assert stats.num_encoder_retries_total > 0
        assert stats.num_encoder_failures_total == 0
        assert stats.num_items_encoded_total == NUM_REQUESTS
        serve_until_ready(engine, folder, num_ready=2)
        assert engine.stats().num_encoder_restarts_total == 1


def serve_until_ready(engine: Engine, folder: Path, *, num_ready: int) -> None:
    deadline = time.monotonic() + 60
    while stage_of(engine).crew.num_ready < num_ready:
        assert time.monotonic() < deadline, "the worker was not started again"
        run(engine, [request(folder, "again", picture(0))])


def await_death(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while stage_of(engine).crew.num_ready:
        assert time.monotonic() < deadline, "the death was not noticed"


def test_a_worker_that_is_stopped_is_ended_and_its_pictures_are_answered(
    folder: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_TIMEOUT_S", 0.2)
    with loaded(folder, vision_workers=1) as engine:
        os.kill(pids(engine)[0], signal.SIGSTOP)
        requests = [request(folder, str(i), picture(i)) for i in range(4)]
        assert run(engine, requests).tokens == {r.id: expected.tokens[r.id] for r in requests}
        serve_until_ready(engine, folder, num_ready=1)
        assert engine.stats().num_encoder_restarts_total == 1


def test_when_the_only_worker_is_killed_the_engine_encodes_until_it_is_back(folder: Path, expected: Answers) -> None:
    with loaded(folder, vision_workers=1) as engine:
        (victim,) = pids(engine)
        os.kill(victim, signal.SIGKILL)
        await_death(engine)  # what is handed to a dying worker waits for the next one
        requests = [request(folder, str(i), picture(i)) for i in range(12)]
        assert run(engine, requests).tokens == {r.id: expected.tokens[r.id] for r in requests}
        assert engine.stats().num_items_encoded_elsewhere_total < engine.stats().num_items_encoded_total == 12
        serve_until_ready(engine, folder, num_ready=1)
        before = stage_of(engine).own.seconds
        assert run(engine, [request(folder, "20", picture(20))]).tokens["20"] == expected.tokens["20"]
        assert stage_of(engine).own.seconds == before, "the engine encoded itself beside a worker that is ready"


@pytest.mark.parametrize("value", [pytest.param(255, id="kills"), pytest.param(254, id="is refused")])
def test_a_picture_that_no_worker_can_encode_fails_its_own_request_only(
    folder: Path, expected: Answers, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessEncoder, "module", BAD_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with loaded(folder, vision_workers=2) as engine:
        good = [request(folder, str(i), picture(i)) for i in range(6)]
        answers = run(engine, [*good[:3], request(folder, "bad", plain(value)), *good[3:]])
        assert answers.errors == {"bad": "the image could not be encoded"}
        assert {r.id: answers.tokens[r.id] for r in good} == {r.id: expected.tokens[r.id] for r in good}
        assert engine.stats().num_encoder_failures_total == 1


def test_without_a_worker_that_starts_the_engine_encodes_and_says_why(
    folder: Path, expected: Answers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ProcessEncoder, "module", "no_such_module")
    with loaded(folder, vision_workers=1) as engine, caplog.at_level(logging.WARNING):
        assert run(engine, [request(folder, "3", picture(3))]).tokens["3"] == expected.tokens["3"]
    said = [record.message for record in caplog.records if "the engine encodes in its step" in record.message]
    assert len(said) == 1


def test_a_worker_that_dies_before_its_first_line_is_stopped_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written for it and never read must not fail its end, which frees the socket."""
    folder = SharedFolder()
    worker = ProcessEncoder(EngineConfig(model=str(tmp_path)), folder, torch.float32, "no_such_module")
    monkeypatch.setattr(subprocess, "Popen", ended_at_once(subprocess.Popen))
    try:
        with pytest.raises(OSError, match="Broken pipe"):
            worker.start()
    finally:
        worker.stop()
        folder.close()
    assert not worker.is_alive()


def ended_at_once(popen: Callable[..., subprocess.Popen[bytes]]) -> Callable[..., subprocess.Popen[bytes]]:
    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = popen(*args, **options)
        process.wait()
        return process

    return start


def test_a_device_that_is_not_there_is_a_wrong_setting(folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match="--vision-device cuda:99"),
        loaded(folder, vision_workers=1, vision_device="cuda:99"),
    ):
        pass


def test_closing_leaves_no_process_and_no_file(folder: Path) -> None:
    before = set(shared_root().glob(f"dashinfer-{os.getpid()}-*"))
    with loaded(folder, vision_workers=2) as engine:
        run(engine, [request(folder, "0", picture(0))])
        workers = pids(engine)
        (made,) = set(shared_root().glob(f"dashinfer-{os.getpid()}-*")) - before
        assert not list(made.glob("[0-9]*")), "files of a batch that is done"
    assert len(workers) == 2
    for pid in workers:
        wait_for_end(pid)
    assert set(shared_root().glob(f"dashinfer-{os.getpid()}-*")) == before


def test_workers_end_with_an_engine_that_is_killed(folder: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.encoders.asking import loaded\n"
        "with loaded(Path(sys.argv[1]), vision_workers=2) as engine:\n"
        "    print(*(encoder.pid for encoder in engine.stage.crew.encoders), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        (sys.executable, "-c", code, str(folder)), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    for pid in workers:
        wait_for_end(pid)
    parent.stdin.close()
    parent.stdout.close()
