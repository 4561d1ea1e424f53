"""Both clients keep the same promises: streams, refusals, aborts, endings."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.engine.host.local import LocalEngine
from dashinfer_vlm.engine.host.process import ProcessEngine
from dashinfer_vlm.errors import ContextLengthError, EngineDeadError, EngineError, InvalidRequestError, OverloadedError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Finish, Item, Output, Request
from dashinfer_vlm.shared_array import SharedFolder
from tests.engine.scripted import INFO, Script, ScriptedEngine

SCRIPTED_PROCESS = (sys.executable, str(Path(__file__).with_name("scripted_process.py")))


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def start(kind: str) -> EngineClient:
    if kind == "local":
        return LocalEngine(ScriptedEngine(), INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessEngine, "command", SCRIPTED_PROCESS)
        return await ProcessEngine.start(EngineConfig())


@pytest_asyncio.fixture(params=["local", "process"], scope="module", loop_scope="module")
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    engine = await start(request.param)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(params=["local", "process"], loop_scope="module")
async def mortal(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    """A client that the test may break."""
    engine = await start(request.param)
    yield engine
    await engine.close()


def ask(name: str, first: int, items: tuple[Item, ...] = (), positions: torch.Tensor | None = None) -> Request:
    return Request(id=name, prompt_ids=[first], items=items, positions=positions)


async def outputs_of(client: EngineClient, request: Request) -> AsyncGenerator[Output, None]:
    """The outputs of `request`; closing it early leaves the request."""
    heard: asyncio.Queue[Output | Fault] = asyncio.Queue()
    client.ask(request, heard.put_nowait)
    try:
        while isinstance(news := await heard.get(), Output):
            yield news
            if news.finish:
                return
        raise news.error()
    finally:
        client.leave(request.id)


async def collect(client: EngineClient, request: Request) -> list[Output]:
    return [output async for output in outputs_of(client, request)]


async def idle(client: EngineClient, num_running: int = 0) -> None:
    """Returns once so many requests run; each question is answered by the loop after its next step."""
    while (await client.stats()).num_running != num_running:
        pass


async def test_a_stream_ends_with_its_final_output(client: EngineClient) -> None:
    outputs = await collect(client, ask("a", 3))
    assert [output.token_ids for output in outputs] == [(1,), (2,), (3,)]
    assert [output.finish for output in outputs] == [None, None, Finish("length")]


async def test_streams_run_together_and_do_not_mix(client: EngineClient) -> None:
    answers = await asyncio.gather(*[collect(client, ask(f"r{n}", n)) for n in range(1, 20)])
    for n, outputs in enumerate(answers, start=1):
        assert [token for output in outputs for token in output.token_ids] == list(range(1, n + 1))
        assert {output.request_id for output in outputs} == {f"r{n}"}


async def test_the_info_is_the_engines(client: EngineClient) -> None:
    assert client.info == INFO
    assert client.alive()


async def test_refusals_arrive_with_their_type_and_fields(client: EngineClient) -> None:
    with pytest.raises(ContextLengthError, match="prompt has 200 tokens") as too_long:
        await collect(client, ask("a", Script.REFUSE_LENGTH))
    assert too_long.value.param == "messages"
    with pytest.raises(OverloadedError) as overloaded:
        await collect(client, ask("b", Script.REFUSE_LOAD))
    assert overloaded.value.retry_after_s == 7
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await collect(client, ask("c", Script.CRASH_ADD))
    assert len(await collect(client, ask("d", 2))) == 2


async def test_an_id_is_free_again_after_its_end(client: EngineClient) -> None:
    assert len(await collect(client, ask("again", 3))) == 3
    async with aclosing(outputs_of(client, ask("again", Script.ENDLESS))) as stream:
        await anext(stream)
        with pytest.raises(InvalidRequestError, match="in use"):
            await collect(client, ask("again", 1))


async def test_closing_a_stream_early_aborts_its_sequence(client: EngineClient) -> None:
    async with aclosing(outputs_of(client, ask("left", Script.ENDLESS))) as stream:
        await anext(stream)
        assert (await client.stats()).num_running == 1
    await idle(client)


async def test_a_cancelled_reader_aborts_its_sequence(client: EngineClient) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async with aclosing(outputs_of(client, ask("cancelled", Script.ENDLESS))) as stream:
            async for _ in stream:
                started.set()

    reader = asyncio.create_task(read())
    await started.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await idle(client)


async def test_a_failed_step_ends_streams_with_an_error_and_the_engine_goes_on(client: EngineClient) -> None:
    outputs = await collect(client, ask("a", Script.CRASH_STEP))
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.reason == "error"
    assert client.alive()
    assert len(await collect(client, ask("b", 1))) == 1


async def test_a_broken_engine_ends_its_streams_and_is_dead(mortal: EngineClient) -> None:
    for i in range(3):
        [output] = await collect(mortal, ask(f"p{i}", Script.CRASH_STEP))
        assert output.finish is not None
        assert output.finish.reason == "error"
    with pytest.raises(EngineDeadError):
        await idle(mortal, num_running=-1)  # the last word about the requests may come before the news of the end
    assert not mortal.alive()
    with pytest.raises(EngineDeadError):
        await collect(mortal, ask("late", 1))
    with pytest.raises(EngineDeadError):
        await mortal.stats()


async def test_closing_ends_running_streams_and_refuses_new_ones(mortal: EngineClient) -> None:
    stream = outputs_of(mortal, ask("a", Script.ENDLESS))
    await anext(stream)
    await mortal.close()
    assert [output.finish async for output in stream][-1] == Finish("abort")
    assert not mortal.alive()
    with pytest.raises(EngineDeadError):
        await collect(mortal, ask("b", 1))
    await mortal.close()


async def test_arrays_reach_the_engine_whole(client: EngineClient) -> None:
    folder = SharedFolder()
    shared = folder.put(np.full((4, 3), 5, np.uint8))
    items = (
        Item(kind="image", start=0, num_tokens=1, content_hash=b"a" * 32, grid=(1, 2, 2), patches=shared),
        Item(
            kind="image", start=1, num_tokens=1, content_hash=b"b" * 32, grid=(1, 1, 1), patches=torch.full((2, 2), 7)
        ),
        Item(
            kind="video",
            start=2,
            num_tokens=2,
            content_hash=b"c" * 32,
            embedding=torch.ones(2, 8, dtype=torch.bfloat16),
        ),
        Item(kind="image", start=4, num_tokens=3, content_hash=b"d" * 32, embedding=torch.ones(8, 3).T),
    )
    [output] = await collect(client, ask("a", Script.ECHO_ITEMS, items, torch.arange(9).reshape(3, 3)))
    assert output.token_ids == (60, 28, 16, 24, 36)
    folder.close()


async def test_a_local_engine_serves_several_event_loops() -> None:
    engine = LocalEngine(ScriptedEngine(), INFO)

    def use(name: str) -> int:
        return len(asyncio.run(collect(engine, ask(name, 5))))

    assert await asyncio.gather(*[asyncio.to_thread(use, f"t{i}") for i in range(4)]) == [5] * 4
    await engine.close()


async def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(ScriptedEngine(), INFO)
    with monkeypatch.context() as child:
        child.setattr("os.getpid", lambda: -1)
        with pytest.raises(EngineDeadError, match="forked"):
            engine.submit(ask("a", 5), lambda news: None)
        with pytest.raises(EngineDeadError, match="forked"):
            engine.read_stats()
    await engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_ends_unexpectedly_lets_nobody_wait() -> None:
    class Quitting(ScriptedEngine):
        def step(self) -> list[Output]:
            raise SystemExit(3)

    engine = LocalEngine(Quitting(), INFO)
    [output] = await collect(engine, ask("a", 3))
    assert output.finish is not None
    assert output.finish.reason == "error"
    assert not engine.alive()
    await engine.close()
