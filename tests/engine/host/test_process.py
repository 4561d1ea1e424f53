"""The engine process: how it starts, how it fails, and that neither side outlives the other."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dashinfer_vlm.child_process import running
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.host.process import ProcessEngine
from dashinfer_vlm.errors import CheckpointError, EngineDeadError, EngineError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Item, Output, Request, SamplingParams
from dashinfer_vlm.shared_array import shared_root
from tests.conftest import CheckpointMaker
from tests.engine.host.test_client import SCRIPTED_PROCESS, ask, collect, outputs_of
from tests.engine.scripted import Script
from tests.tokens import VOCAB


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessEngine, "command", SCRIPTED_PROCESS)


def own_shared_files() -> list[Path]:
    return [path for path in shared_root().glob(f"dashinfer-{os.getpid()}-*/*") if path.name != "engine"]


async def test_loading_reports_its_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    engine = await ProcessEngine.start(EngineConfig(), progress=lambda *news: seen.append(news))
    await engine.close()
    assert seen == [("weights", 1, 3), ("weights", 2, 3), ("weights", 3, 3)]


async def test_a_checkpoint_that_cannot_be_loaded_raises_what_the_child_says() -> None:
    with pytest.raises(CheckpointError, match="tensor x is missing"):
        await ProcessEngine.start(EngineConfig(model="broken"))


async def test_an_unexpected_failure_to_load_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await ProcessEngine.start(EngineConfig(model="crash"))


async def test_a_child_that_ends_without_a_word_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessEngine, "command", (sys.executable, "-c", "raise SystemExit(5)"))
    with pytest.raises(EngineDeadError, match="ended with status 5"):
        await ProcessEngine.start(EngineConfig())


async def test_cancelled_loading_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "import sys; sys.stdin.read()"
    monkeypatch.setattr(ProcessEngine, "command", (sys.executable, "-c", endless))
    spawned = asyncio.Event()
    children: list[asyncio.subprocess.Process] = []
    init = ProcessEngine.__init__

    def spy(self: ProcessEngine, process: asyncio.subprocess.Process, *rest: object) -> None:
        init(self, process, *rest)  # type: ignore[arg-type]
        children.append(process)
        spawned.set()

    monkeypatch.setattr(ProcessEngine, "__init__", spy)
    starting = asyncio.create_task(ProcessEngine.start(EngineConfig()))
    await spawned.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("way", ["kill", "exit"])
async def test_a_child_that_dies_ends_every_stream_with_an_error(way: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = await ProcessEngine.start(EngineConfig())
    streams = [outputs_of(engine, ask(f"r{i}", Script.ENDLESS)) for i in range(4)]
    for stream in streams:
        await anext(stream)
    if way == "kill":
        os.kill(engine.pid, signal.SIGKILL)
        word = "SIGKILL"
    else:
        streams.insert(0, outputs_of(engine, ask("fatal", Script.CRASH_EXIT)))
        word = "status 3"
    for stream in streams:
        last = [output.finish async for output in stream][-1]
        assert last is not None
        assert last.reason == "error"
        assert word in (last.message or "")
    assert not engine.alive()
    with pytest.raises(EngineDeadError, match=word):
        await collect(engine, ask("late", 1))
    await engine.close()
    gc.collect()  # asyncio complains of exceptions that nobody took when their futures go
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_kill_under_many_fast_streams_is_told_within_a_second() -> None:
    """However much the child has said that is not handed out yet."""
    engine = await ProcessEngine.start(EngineConfig())
    streams = [outputs_of(engine, ask(f"r{i}", Script.ENDLESS)) for i in range(35)]
    for stream in streams:
        await anext(stream)
    time.sleep(1)  # noqa: ASYNC251 - a busy parent: the child's words pile up
    os.kill(engine.pid, signal.SIGKILL)
    killed_s = time.perf_counter()

    async def last(stream: AsyncGenerator[Output, None]) -> str | None:
        return [output.finish async for output in stream][-1].reason  # type: ignore[union-attr]

    assert set(await asyncio.gather(*map(last, streams))) == {"error"}
    assert time.perf_counter() - killed_s < 1
    await engine.close()


async def test_a_child_that_is_stopped_is_ended_and_its_streams_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessEngine, "stop_timeout_s", 1.0)
    engine = await ProcessEngine.start(EngineConfig())
    stream = outputs_of(engine, ask("a", Script.ENDLESS))
    await anext(stream)
    os.kill(engine.pid, signal.SIGSTOP)
    last = [output.finish async for output in stream][-1]
    assert last is not None
    assert (last.reason, "has not answered for" in (last.message or "")) == ("error", True)
    assert not engine.alive()
    await engine.close()


async def test_a_step_without_end_counts_as_stuck() -> None:
    engine = await ProcessEngine.start(EngineConfig(step_timeout_s=1))
    outputs = await collect(engine, ask("a", Script.HANG))
    assert outputs[-1].finish is not None
    assert "has not answered for" in (outputs[-1].finish.message or "")
    assert not engine.alive()
    await engine.close()


async def test_ctrl_c_reaches_the_parent_only() -> None:
    engine = await ProcessEngine.start(EngineConfig())
    assert os.getpgid(engine.pid) != os.getpgid(0)
    assert len(await collect(engine, ask("a", 2))) == 2
    await engine.close()


async def test_a_child_ends_with_its_parent_and_leaves_nothing_of_either_in_shared_memory() -> None:
    code = (
        "import asyncio, sys\n"
        "from dashinfer_vlm.config import EngineConfig\n"
        "from dashinfer_vlm.engine.host.process import ProcessEngine\n"
        f"ProcessEngine.command = {SCRIPTED_PROCESS!r}\n"
        "async def main():\n"
        "    engine = await ProcessEngine.start(EngineConfig())\n"
        "    print(engine.pid, engine._folder.path, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child, folder = (await parent.stdout.readline()).split()
    watch = os.pidfd_open(int(child))
    parent.kill()
    await parent.wait()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(watch, ended.set)
    await asyncio.wait_for(ended.wait(), 10)
    asyncio.get_running_loop().remove_reader(watch)
    os.close(watch)
    assert await asyncio.to_thread(is_removed, Path(folder.decode()))


def is_removed(folder: Path) -> bool:
    """At once or soon: who sweeps at the same moment, another test's process, removes it instead."""
    deadline = time.monotonic() + 5
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not folder.exists()


async def test_arrays_made_for_the_journey_are_removed_with_the_request() -> None:
    engine = await ProcessEngine.start(EngineConfig())
    item = Item(kind="image", start=0, num_tokens=2, content_hash=b"c" * 32, embedding=torch.ones(2, 8))
    stream = outputs_of(engine, Request(id="a", prompt_ids=[Script.ENDLESS], items=(item,)))
    await anext(stream)
    assert own_shared_files()
    await stream.aclose()
    assert not own_shared_files()
    await engine.close()


async def test_a_closed_engine_leaves_no_folder_in_shared_memory() -> None:
    engine = await ProcessEngine.start(EngineConfig())
    await engine.close()
    assert not list(shared_root().glob(f"dashinfer-{os.getpid()}-*/engine"))


async def test_a_close_that_nobody_waits_for_any_more_goes_on_and_the_next_one_waits_for_it() -> None:
    """As when a server ends while its keeper clears away an engine that has died."""
    engine = await ProcessEngine.start(EngineConfig())
    first = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await engine.close()
    assert not list(shared_root().glob(f"dashinfer-{os.getpid()}-*/engine"))


async def test_a_real_checkpoint_is_loaded_and_answers(
    monkeypatch: pytest.MonkeyPatch, checkpoint: CheckpointMaker
) -> None:
    monkeypatch.setattr(ProcessEngine, "command", running("dashinfer_vlm.engine.host.child"))
    stages: list[tuple[str, int, int]] = []
    config = EngineConfig(model=str(checkpoint()), device="cpu", dtype="float32", kv_cache_gib=0.1, max_model_len=256)
    engine = await ProcessEngine.start(config, progress=lambda *news: stages.append(news))
    assert engine.info.vocab_size == VOCAB
    assert engine.info.dtype == "float32"
    assert stages[-1][1] == stages[-1][2] > 0
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    outputs = await collect(engine, Request(id="a", prompt_ids=[1, 2, 3], params=params))
    assert sum(len(output.token_ids) for output in outputs) == 5
    assert (await engine.stats()).num_output_tokens_total == 5
    await engine.close()


async def test_a_folder_without_a_model_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ProcessEngine, "command", running("dashinfer_vlm.engine.host.child"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        await ProcessEngine.start(EngineConfig(model=str(tmp_path)))


async def test_a_step_of_very_many_outputs_is_heard_in_parts_between_which_others_run() -> None:
    engine = await ProcessEngine.start(EngineConfig())
    num_heard, turns = 0, [0]

    def hear(news: Output | Fault) -> None:
        nonlocal num_heard
        num_heard += 1

    for number in range(300):
        engine.ask(ask(f"r{number}", Script.ENDLESS), hear)
    while num_heard < 3000:
        await asyncio.sleep(0)
        turns.append(num_heard)
    assert max(after - before for before, after in pairwise(turns)) <= 64
    await engine.close()
