"""An engine process that dies is replaced, with pauses and not without end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import OnProgress
from dashinfer_vlm.engine.host.process import ProcessEngine
from dashinfer_vlm.engine.host.restarts import RestartedEngine
from dashinfer_vlm.errors import EngineDeadError
from tests.engine.host.test_client import SCRIPTED_PROCESS, ask, collect, outputs_of
from tests.engine.scripted import Script

Start = Callable[[int], Awaitable[RestartedEngine]]


class Child:
    """As much of a ProcessEngine as who replaces it looks at."""

    made: list[Child] = []
    failing = False

    def __init__(self) -> None:
        self.died = asyncio.Event()
        self.is_closed = False

    @classmethod
    async def start(cls, config: EngineConfig, *, progress: OnProgress | None = None) -> Child:
        if cls.failing:
            raise EngineDeadError("the engine process ended with status 5")
        cls.made.append(cls())
        return cls.made[-1]

    def alive(self) -> bool:
        return not self.died.is_set()

    async def wait_dead(self) -> None:
        await self.died.wait()

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    monkeypatch.setattr("dashinfer_vlm.engine.host.restarts.ProcessEngine", Child)
    monkeypatch.setattr(RestartedEngine, "first_pause_s", 0.01)
    monkeypatch.setattr(Child, "made", [])
    engines: list[RestartedEngine] = []

    async def start_one(max_restarts: int) -> RestartedEngine:
        engines.append(await RestartedEngine.start(EngineConfig(), max_restarts))
        return engines[-1]

    yield start_one
    for engine in engines:
        await engine.close()
    assert all(child.is_closed for child in Child.made)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - it happens in other tasks and processes
            await asyncio.sleep(0.005)


async def die(engine: RestartedEngine) -> None:
    Child.made[-1].died.set()
    assert not engine.alive()


async def test_requests_end_with_an_error_and_the_next_engine_takes_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessEngine, "command", SCRIPTED_PROCESS)
    engine = await RestartedEngine.start(EngineConfig(), 1)
    first_pid, stream = engine.pid, outputs_of(engine, ask("a", Script.ENDLESS))
    await anext(stream)
    os.kill(engine.pid, signal.SIGKILL)
    last = [output.finish async for output in stream][-1]
    assert last is not None
    assert (last.reason, "SIGKILL" in (last.message or "")) == ("error", True)
    assert (engine.alive(), engine.gone()) == (False, False)
    with pytest.raises(EngineDeadError):
        await collect(engine, ask("between", 1))
    await until(engine.alive)
    assert engine.pid != first_pid
    assert len(await collect(engine, ask("a", 3))) == 3
    assert (await engine.stats()).num_restarts_total == 1
    await engine.close()


async def test_one_that_dies_too_often_is_gone(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    engine = await start(2)
    for _ in range(2):
        await die(engine)
        await until(engine.alive)
    await die(engine)
    await until(engine.gone)
    assert len(Child.made) == 3
    assert "has died 3 times within 600 s and is not started again" in caplog.text


async def test_deaths_of_long_ago_do_not_count(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashinfer_vlm.engine.host.restarts.WINDOW_S", 0.0)
    engine = await start(1)
    for _ in range(5):
        await die(engine)
        await until(engine.alive)
    assert not engine.gone()


async def test_without_restarts_the_first_death_is_the_end(start: Start) -> None:
    engine = await start(0)
    await die(engine)
    await until(engine.gone)
    assert len(Child.made) == 1


async def test_starts_that_fail_count_and_the_pauses_between_them_grow(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    engine = await start(3)
    monkeypatch.setattr(Child, "failing", True)
    await die(engine)
    await until(engine.gone)
    pauses = [message for message in caplog.messages if "is started again in" in message]
    assert [message.split()[-2] for message in pauses] == ["0.01", "0.02", "0.04"]
    assert caplog.text.count("could not be started again: the engine process ended with status 5") == 3


async def test_a_failure_that_nobody_foresaw_is_the_end_and_not_a_server_without_engine(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(config: EngineConfig) -> Child:
        raise ZeroDivisionError

    engine = await start(3)
    monkeypatch.setattr(Child, "start", fail)
    await die(engine)
    await until(engine.gone)


async def test_closing_does_not_wait_for_the_next_engine(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RestartedEngine, "first_pause_s", 600.0)
    engine = await start(3)
    await die(engine)
    await asyncio.sleep(0)
    await engine.close()
    assert len(Child.made) == 1
