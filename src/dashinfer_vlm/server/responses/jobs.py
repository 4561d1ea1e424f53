"""How responses are written: whole, as events, or in the background while nobody waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from dashinfer_vlm.frontend.deltas import Delta
from dashinfer_vlm.frontend.generation import Generation
from dashinfer_vlm.frontend.tenants import current_tenant
from dashinfer_vlm.server.responses.replies import ResponseReply
from dashinfer_vlm.server.responses.writer import ResponseWriter
from dashinfer_vlm.server.stream import named

logger = logging.getLogger(__name__)

Keep = Callable[[ResponseReply], Awaitable[None]]
"""Stores a response that is over, if it is to be stored."""


async def keep_nothing(reply: ResponseReply) -> None:
    """For responses that are not."""


async def write(generation: Generation, writer: ResponseWriter) -> None:
    """Read `generation` to its end; it is closed when it fails or the reader is cancelled."""
    try:
        async for delta in generation:
            writer.news(delta)
    finally:
        generation.close()
    writer.end(generation.usage)


def shown(writer: ResponseWriter, delta: Delta) -> bytes:
    """The events of `delta`."""
    return named(writer.news(delta))


async def tell(generation: Generation, first: Delta, writer: ResponseWriter, keep: Keep) -> AsyncIterator[bytes]:
    """The events of a response, as they come, `first` being what was read of it; errors are told by the last one.

    It is stored before its end is told, so that it can be gone on with at once.
    """
    yield named(writer.begin()) + shown(writer, first)
    try:
        async for delta in generation:
            yield shown(writer, delta)
        last = writer.end(generation.usage)
    except Exception as error:  # noqa: BLE001  the status is sent already, so the stream itself must tell
        last = writer.fail(error)
    try:
        await keep(writer.reply)
    except Exception as error:  # noqa: BLE001  likewise
        last = writer.fail(error, stored=False)
    yield named(last)


@dataclass(slots=True)
class Job:
    """A response in the background."""

    tenant: str
    input: bytes
    """Its items, a JSON list."""
    writer: ResponseWriter
    task: asyncio.Task[None] = field(init=False)

    @property
    def is_under_way(self) -> bool:
        """Whether it is being written; afterwards it is stored, which its task ends with."""
        return self.writer.reply.status == "in_progress"

    def end(self) -> None:
        """Write no more of it. What is over is stored all the same."""
        if self.is_under_way:
            self.task.cancel()


class Jobs:
    """All responses in the background, until they are over and stored."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    @property
    def num_bytes(self) -> int:
        """Of the inputs that they hold."""
        return sum(len(job.input) for job in self._jobs.values())

    def start(self, job: Job, generation: Generation, keep: Keep) -> None:
        id = job.writer.reply.id
        self._jobs[id] = job
        job.task = asyncio.create_task(_run(job.writer, generation, keep))
        job.task.add_done_callback(lambda task: self._forget(id, task))

    def find(self, tenant: str, id: str) -> Job | None:
        job = self._jobs.get(id)
        return job if job is not None and job.tenant == tenant else None

    async def cancel(self, tenant: str, id: str) -> ResponseReply | None:
        """End it, with what it has said so far; None where it is not under way."""
        job = self.find(tenant, id)
        if job is None:
            return None
        job.end()
        await asyncio.wait({job.task})
        return job.writer.reply

    async def close(self) -> None:
        """End all."""
        jobs = list(self._jobs.values())
        for job in jobs:
            job.end()
        await asyncio.gather(*(job.task for job in jobs), return_exceptions=True)

    def _forget(self, id: str, task: asyncio.Task[None]) -> None:
        del self._jobs[id]
        if not task.cancelled() and (error := task.exception()):
            logger.error("a response in the background could not be stored", exc_info=error)


async def _run(writer: ResponseWriter, generation: Generation, keep: Keep) -> None:
    with current_tenant.get().task():
        try:
            await write(generation, writer)
        except asyncio.CancelledError:
            writer.cancel()
        except Exception as error:  # noqa: BLE001  nobody waits, so the response itself must tell
            writer.fail(error)
        await keep(writer.reply)
