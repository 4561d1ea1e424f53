"""Decoding processes and their life: started when first needed, one job each at a time, replaced when they die.

A process that crashes, runs out of memory or takes too long costs the one item it worked on a MediaError.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections import deque
from pathlib import Path

import anyio
import msgspec

from dashinfer_vlm.allocator import RETURNED_BYTES
from dashinfer_vlm.child_process import running
from dashinfer_vlm.errors import EngineError, MediaError, MediaTooLargeError, OverloadedError
from dashinfer_vlm.media.cache import BUSY
from dashinfer_vlm.media.registry import MEDIA
from dashinfer_vlm.media.turns import ANYBODY, Party, Turns
from dashinfer_vlm.media.wire import LENGTH_BYTES, Decoded, DecodeJob, Failed, Ready, Reply
from dashinfer_vlm.shared_array import SharedArray

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
ABANDONED_S = 1.0
"""How long a job may go on that nobody waits for; most end sooner than a new process would start."""

MAX_REPLY_BYTES = 1 << 20
_STDERR_LINES = 20


class SharedMemoryFullError(OverloadedError):
    """The features of an item do not fit the memory folder now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="shared_memory")


_FAILURES = {"media": MediaError, "too_large": MediaTooLargeError, "no_room": SharedMemoryFullError}


class WorkerPool:
    """`num_workers` decoding processes behind one call. Belongs to one event loop."""

    def __init__(self, num_workers: int, *, memory_mib: int, folder: Path, wait_timeout_s: float = 30.0) -> None:
        self._folder = folder
        self._wait_timeout_s = wait_timeout_s
        self._workers = [_Worker(memory_mib) for _ in range(num_workers)]
        self._idle = list(self._workers)
        self._turns = Turns(num_workers)
        self._running: set[asyncio.Task[tuple[Decoded, SharedArray]]] = set()

    @property
    def num_restarts(self) -> int:
        """Processes that were started in place of another one."""
        return sum(max(worker.num_starts - 1, 0) for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that live."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    @property
    def num_busy(self) -> int:
        return len(self._workers) - len(self._idle)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a process."""
        return self._turns.num_waiting

    async def start(self) -> None:
        """Start all processes ahead of the first job. Raises EngineError when one does not come up."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def run(self, job: DecodeJob, timeout_s: float, party: Party = ANYBODY) -> tuple[Decoded, SharedArray]:
        """Do `job` (its folder and name are filled in here) for `party`, in its turn; the caller owns the array.

        Raises MediaError for what the item causes, a death of the process included, OverloadedError without shared
        memory and when no process is free in time; `timeout_s` is for the work itself.
        """
        job = msgspec.structs.replace(job, folder=str(self._folder), name=secrets.token_hex(8))
        try:
            with anyio.fail_after(self._wait_timeout_s):
                await self._turns.take(party)
        except TimeoutError as error:
            raise OverloadedError(BUSY, reason="media_wait") from error
        worker = self._idle.pop()
        task = asyncio.create_task(self._occupy(worker, job, timeout_s, party))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            _abandon(task, worker)
            raise

    async def _occupy(
        self, worker: _Worker, job: DecodeJob, timeout_s: float, party: Party
    ) -> tuple[Decoded, SharedArray]:
        path = self._folder / job.name
        try:
            decoded = await self._work(worker, job, timeout_s)
            return decoded, _array(path, decoded, job)
        except BaseException:  # nobody else knows the file
            path.unlink(missing_ok=True)
            raise
        finally:
            self._idle.append(worker)
            self._turns.give_back(party)

    async def _work(self, worker: _Worker, job: DecodeJob, timeout_s: float) -> Decoded:
        await worker.start()
        try:
            with anyio.fail_after(timeout_s):
                reply = await worker.call(msgspec.msgpack.encode(job))
        except TimeoutError as error:
            worker.kill()
            raise MediaTooLargeError(
                f"decoding the {job.kind} takes longer than {timeout_s:g} s; send a smaller one"
            ) from error
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError) as error:
            worker.kill()
            log.warning("a media process died on a %s of %d bytes: %s", job.kind, _num_bytes(job), worker.last_words)
            raise MediaError(f"the {job.kind} cannot be decoded: it crashes the decoder") from error
        except asyncio.CancelledError:
            worker.kill()  # its answer would be taken for the next job's
            raise
        if isinstance(reply, Failed):
            raise _FAILURES[reply.kind](reply.message)
        assert isinstance(reply, Decoded), reply
        return reply

    async def close(self) -> None:
        """End all processes; jobs that still run are cancelled."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))


class _Worker:
    """One process, restarted by `start` when it is not there."""

    def __init__(self, memory_mib: int) -> None:
        self._memory_mib = memory_mib
        self._process: asyncio.subprocess.Process | None = None
        self._stderr: deque[bytes] = deque(maxlen=_STDERR_LINES)
        self._drain: asyncio.Task[None] | None = None
        self._killed = False
        self._starting = asyncio.Lock()
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        if self._process is None or self._killed or self._process.returncode is not None:
            return None
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The end of what the process wrote to stderr; escaped, since a client's bytes may have shaped it."""
        return repr(b"".join(self._stderr)[-2000:])

    async def start(self) -> None:
        """Start the process unless it lives. Raises EngineError when it does not come up."""
        async with self._starting:
            if self.pid is None:
                await self.close()
                await self._start()

    async def _start(self) -> None:
        command = running("dashinfer_vlm.media.decode", str(self._memory_mib), options=("-s",))
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment(), start_new_session=True
        )
        self._killed = False
        self._drain = asyncio.create_task(self._drain_stderr(self._process))
        self.num_starts += 1
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                ready = await self._receive()
        except asyncio.CancelledError:
            self.kill()
            raise
        except (asyncio.IncompleteReadError, TimeoutError, msgspec.DecodeError) as error:
            self.kill()
            log.error("a media process does not start: %s", self.last_words)
            raise EngineError("the process that decodes media does not start; see the server's log") from error
        assert isinstance(ready, Ready), ready

    async def call(self, message: bytes) -> Reply:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(len(message).to_bytes(LENGTH_BYTES, "big"))
        self._process.stdin.write(message)
        await self._process.stdin.drain()
        return await self._receive()

    def kill(self) -> None:
        """End the process at once, also one that is stopped; from here on it counts as gone."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        self.kill()
        if self._process is not None:
            await self._process.wait()
        if self._drain is not None:
            await self._drain
        self._process = self._drain = None

    async def _receive(self) -> Reply:
        assert self._process is not None
        assert self._process.stdout is not None
        length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "big")
        if length > MAX_REPLY_BYTES:
            raise msgspec.DecodeError(f"a reply of {length} bytes")
        reply: Reply = msgspec.msgpack.decode(await self._process.stdout.readexactly(length), type=Reply)
        return reply

    async def _drain_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.read(1 << 12):
            self._stderr.append(line)


def _abandon(task: asyncio.Task[tuple[Decoded, SharedArray]], worker: _Worker) -> None:
    """Let a job that nobody waits for end, within bounds, and remove what it made."""

    def give_up() -> None:
        if not task.done():  # or the process works for somebody else by now
            worker.kill()

    timer = asyncio.get_running_loop().call_later(ABANDONED_S, give_up)

    def ended(task: asyncio.Task[tuple[Decoded, SharedArray]]) -> None:
        timer.cancel()
        if not task.cancelled() and task.exception() is None:
            task.result()[1].remove()

    task.add_done_callback(ended)


def _environment() -> dict[str, str]:
    """Only what Python needs: keys and tokens of the server must not reach a process that may be taken over."""
    kept = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"  # each thread's stack is address space
    # Larger buffers go back to the system when they are freed (`allocator.return_freed_memory`, `make fuzz`)
    environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = str(RETURNED_BYTES)
    return environment


def _array(path: Path, decoded: Decoded, job: DecodeJob) -> SharedArray:
    """The features, described by what was asked rather than by what the process says."""
    array = SharedArray(str(path), *MEDIA[job.kind].layout(decoded.grid, job.terms.config))
    if min(decoded.grid) < 1 or path.stat().st_size != array.nbytes:
        raise MediaError(f"the {job.kind} cannot be decoded: the decoder's answer makes no sense")
    return array


def _num_bytes(job: DecodeJob) -> int:
    return sum(len(source) for source in job.sources)
