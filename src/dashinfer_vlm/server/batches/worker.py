"""Answers batches, one after the other, in the gaps that interactive requests leave.

    validating ──► in_progress ──► finalizing ──► completed
         │              ├────────► expired        its time is over
         │              └────────► failed         the reason is in `errors`
         └── cancelling ─────────► cancelled

What has been answered stands on disk. A server that ends leaves its batch as it is, and the next one goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from dashinfer_vlm.errors import ConfigError, EngineDeadError
from dashinfer_vlm.frontend.service import Service
from dashinfer_vlm.frontend.tenants import Tenant, TenantLimits, current_tenant
from dashinfer_vlm.server.auth import TENANT
from dashinfer_vlm.server.batches.ends import BatchInput, BatchOutput
from dashinfer_vlm.server.batches.lines import BatchError, BatchRecord, encoded, record_id
from dashinfer_vlm.server.batches.run import BatchRun
from dashinfer_vlm.server.batches.store import Batch, Fault, Outcome, Store
from dashinfer_vlm.server.batches.usage import plus, usage_of
from dashinfer_vlm.server.errors import HttpError

logger = logging.getLogger(__name__)

_LIMITS = TenantLimits(weight=0.1)
"""Batches are tenants of their own, whose turn it seldom is while others wait."""
_LATE = BatchError("batch_expired", "the batch's time was over before this request was answered")


class BatchFailedError(Exception):
    """A batch cannot go on, and its owner is told why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Records:
    """Where a batch's records go: answers into one file, errors into another, each counted by the store."""

    can_resume = True

    def __init__(self, store: Store, batch: Batch) -> None:
        """Raises ConfigError."""
        self.name = batch.id
        self._store = store
        good, bad = store.records(batch)
        self._good = BatchOutput(good)
        self._bad = BatchOutput(bad)
        self.done = self._good.done | self._bad.done
        self.num_good, self.num_bad = len(self._good.done), len(self._bad.done)
        """Also those of the servers before."""
        self.usage = self._good.usage
        """Likewise."""

    def write(self, record: BatchRecord) -> None:
        """Raises BatchFailedError when there is no room."""
        line = encoded(record)
        try:
            self._store.take(len(line))
        except HttpError as error:
            raise BatchFailedError("storage_full", str(error)) from error
        (self._good if record.is_good else self._bad).append(line)
        self.num_good += record.is_good
        self.num_bad += not record.is_good
        if record.response is not None:
            self.usage = plus(self.usage, usage_of(record.response.body))

    def close(self) -> None:
        self._good.close()
        self._bad.close()


class BatchWorker:
    """Works on the batches of one store. Belongs to one event loop."""

    def __init__(self, store: Store, service: Service, *, concurrency: int) -> None:
        """`concurrency` requests run at once while nobody else asks anything; otherwise one."""
        self._store = store
        self._service = service
        self._concurrency = concurrency
        self._news = asyncio.Event()
        self._at_work: str | None = None
        """The id of the batch that is worked on."""
        self._asking: asyncio.Task[None] | None = None
        """What asks its requests, once its file was read."""

    def wake(self) -> None:
        """There is a new batch."""
        self._news.set()

    def cancel(self, batch: Batch) -> Batch:
        """End an open batch: at once, or as soon as its running requests are given up."""
        if batch.outcome is not None:
            return batch
        batch = self._store.change(batch, status="cancelling", cancelling_at=batch.cancelling_at or self._store.now())
        if batch.id != self._at_work:
            return self._finish(self._end(batch, "cancelled"))
        if self._asking is not None:
            self._asking.cancel()
        return batch

    @asynccontextmanager
    async def working(self, app: ASGIApp) -> AsyncIterator[None]:
        """Ask `app` while the block runs, and the service takes requests."""
        work = asyncio.create_task(self._work(app))
        stop = asyncio.create_task(self._service.draining.wait())
        stop.add_done_callback(lambda _: work.cancel())
        try:
            yield
        finally:
            stop.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _work(self, app: ASGIApp) -> None:
        """Until the engine is gone for good; the next server goes on then."""
        while not self._service.engine.gone():
            self._news.clear()
            if batches := self._store.open_batches():
                await self._advance(batches[0], app)
            else:
                await self._news.wait()

    async def _advance(self, batch: Batch, app: ASGIApp) -> None:
        self._at_work = batch.id
        try:
            if batch.outcome is None:
                outcome = "cancelled" if batch.status == "cancelling" else await self._answer(batch, app)
                batch = self._end(batch, outcome)
            self._finish(batch)
        except EngineDeadError:
            return
        except Exception as error:  # noqa: BLE001  whatever it is, its batch must not come up again and again
            self._finish(self._end(batch, "failed", _fault(error)))
        finally:
            self._at_work = None

    async def _answer(self, batch: Batch, app: ASGIApp) -> Outcome:
        """Until all lines are answered, time is over, or the owner cancels it. Raises what stops it before."""
        if batch.model != self._service.engine.info.model:
            raise BatchFailedError(
                "model_changed", f"the batch was made for {batch.model_name}, which is not what is served now"
            )
        path = self._store.path(self._store.file(batch.input_file_id, batch.owner))
        source = await asyncio.to_thread(BatchInput, path, url=batch.endpoint)
        if self._store.batch(batch.id, batch.owner).status == "cancelling":
            return "cancelled"
        if not source.num_lines:
            raise BatchFailedError("empty_file", "the input file has no line")
        with closing(Records(self._store, batch)) as records:
            begun = batch.in_progress_at or self._store.now()
            self._store.change(batch, status="in_progress", in_progress_at=begun, num_requests=source.num_lines)
            self._count(batch, records)
            outcome = await self._run(batch, source, records, app)
            if outcome == "expired":
                await self._write_late(batch, source, records)
            return outcome

    async def _run(self, batch: Batch, source: BatchInput, records: Records, app: ASGIApp) -> Outcome:
        tenant = Tenant(_LIMITS, id=f"{batch.owner}:batch")
        tenant.has_neighbours = bool(batch.owner)
        tenant.gives_way = True
        run = BatchRun(
            _asked_by(tenant, app),
            records,
            window=lambda: self._window(tenant),
            is_alive=lambda: not self._service.engine.gone(),
            on_record=lambda _: self._count(batch, records),
        )
        self._asking = task = asyncio.create_task(run.run(source))
        try:
            done, _ = await asyncio.wait({task}, timeout=max(0, batch.expires_at - self._store.now()))
            if done and not task.cancelled():
                task.result()
            return "expired" if not done else "cancelled" if task.cancelled() else "completed"
        finally:
            self._asking = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _window(self, tenant: Tenant) -> int:
        is_busy = self._service.num_in_flight > tenant.num_choices
        return 1 if is_busy else self._concurrency

    def _count(self, batch: Batch, records: Records) -> None:
        self._store.count(batch, num_completed=records.num_good, num_failed=records.num_bad, usage=records.usage)

    async def _write_late(self, batch: Batch, source: BatchInput, records: Records) -> None:
        """An error for each line that has no answer."""
        late = await asyncio.to_thread(lambda: [(n, line.custom_id) for n, line in source.open_lines(records.done)])
        for number, custom_id in late:
            records.write(BatchRecord(id=record_id(number), custom_id=custom_id, error=_LATE))
            await asyncio.sleep(0)
        self._count(batch, records)

    def _end(self, batch: Batch, outcome: Outcome, fault: Fault | None = None) -> Batch:
        """From now on it only needs its files put in place, whatever happens."""
        good, bad = (self._store.new_file_id() if _has_content(path) else None for path in self._store.records(batch))
        changes: dict[str, Any] = {"outcome": outcome, "fault": fault, "output_file_id": good, "error_file_id": bad}
        if outcome == "completed":
            changes |= {"status": "finalizing", "finalizing_at": self._store.now()}
        return self._store.change(batch, **changes)

    def _finish(self, batch: Batch) -> Batch:
        now, outcome = self._store.now(), batch.outcome
        assert outcome is not None, batch
        good, bad = self._store.records(batch)
        for path, id, name in ((good, batch.output_file_id, "output"), (bad, batch.error_file_id, "error")):
            if id is not None:
                self._store.adopt(path, id, f"{batch.id}_{name}.jsonl", batch)
            path.unlink(missing_ok=True)
        return self._store.change(batch, status=outcome, **{f"{outcome}_at": now})


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _fault(error: Exception) -> Fault:
    if isinstance(error, BatchFailedError):
        return Fault(code=error.code, message=str(error))
    if isinstance(error, (ConfigError, HttpError)):
        return Fault(code="invalid_input", message=str(error))
    logger.error("a batch has failed", exc_info=error)
    return Fault(code="internal_error", message="the server could not go on with this batch; its log says more")


def _asked_by(tenant: Tenant, app: ASGIApp) -> ASGIApp:
    """`app` as batches ask it: within the server, where nobody shows a key."""

    async def ask(scope: Scope, receive: Receive, send: Send) -> None:
        current_tenant.set(tenant)
        await app({**scope, TENANT: tenant}, receive, send)

    return ask
