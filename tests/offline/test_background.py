"""The event loop behind the synchronous API."""

from __future__ import annotations

import asyncio
import threading

import pytest

from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.offline.background import BackgroundLoop


def test_who_still_waits_when_it_is_closed_is_told() -> None:
    loop, begun = BackgroundLoop(), threading.Event()
    told: list[BaseException] = []

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    def caller() -> None:
        with pytest.raises(EngineDeadError, match="was closed") as error:
            loop.run(wait())
        told.append(error.value)

    thread = threading.Thread(target=caller, daemon=True)
    thread.start()
    assert begun.wait(10)
    loop.close()
    thread.join(10)
    assert told


async def test_so_is_who_waits_in_a_loop_of_its_own() -> None:
    loop, begun = BackgroundLoop(), threading.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(loop.arun(wait()))
    assert await asyncio.to_thread(begun.wait, 10)
    await asyncio.to_thread(loop.close)
    with pytest.raises(EngineDeadError, match="was closed"):
        await asyncio.wait_for(waiting, 10)


async def test_a_caller_that_is_cancelled_is_not_told_that_it_was_closed() -> None:
    loop = BackgroundLoop()
    waiting = asyncio.create_task(loop.arun(asyncio.sleep(60)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    loop.close()
