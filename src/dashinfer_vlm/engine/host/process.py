"""An engine in a child process, so that neither Python's lock nor a crash is shared with it: for servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dashinfer_vlm.child_process import how_it_ended, is_stopped, running
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import Listener, OnProgress
from dashinfer_vlm.engine.host.streams import CLOSED, Listeners, silent, stats_or_raise
from dashinfer_vlm.engine.host.wire import (
    Abort,
    Close,
    Event,
    Failed,
    Outputs,
    Progress,
    Ready,
    Start,
    WireCommand,
    WireEvent,
    event_decoder,
    to_wire,
)
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.errors import EngineDeadError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.log_lines import LogStyle
from dashinfer_vlm.request import Finish, Request
from dashinfer_vlm.shared_array import SharedArray, SharedFolder

__all__ = ["ProcessEngine"]

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often the engine is asked whether it still turns."""
_OUTPUTS_AT_ONCE = 64
_LAST_WORDS_S = 0.2
"""How long messages may still be in the socket after the process that sent them has ended."""


class ProcessEngine:
    """An engine in a child process. All methods belong to the event loop that `start` ran in.

    The child has a session of its own, so that Ctrl-C reaches the parent only, and it ends when the parent does.
    """

    command: tuple[str, ...] = running("dashinfer_vlm.engine.host.child")
    close_timeout_s = 10.0
    """How long the child may take to end by itself: one step and the unloading of its model."""

    stop_timeout_s = 10.0
    """How long the child may be stopped by a signal, as a debugger does, before it counts as stuck."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, folder: SharedFolder) -> None:
        self._process = process
        self._watch: asyncio.Task[None] | None = None
        self._why_ended: str | None = None
        self._exit = asyncio.create_task(process.wait())
        self._socket = socket
        self._folder = folder
        self._listeners = Listeners()
        self._shared: dict[str, list[SharedArray]] = {}
        """Arrays of running requests that only the child needs."""
        self._info: EngineInfo | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig, *, progress: OnProgress | None = None) -> ProcessEngine:
        """Start the child and wait until it has loaded the model of `config`.

        Raises the child's CheckpointError or ConfigError, and EngineDeadError when it ends without a word.
        """
        folder = SharedFolder()
        address = f"ipc://{folder.path}/engine"
        socket: zmq.asyncio.Socket = zmq.asyncio.Context().socket(zmq.PAIR)
        socket.set_hwm(0)  # neither side may wait for one that is busy for a moment
        socket.bind(address)
        process = await asyncio.create_subprocess_exec(
            *cls.command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        engine = cls(process, socket, folder)
        try:
            await engine._load(Start(address, config, LogStyle.current()), progress or silent)
        except BaseException:
            await engine.close()
            raise
        engine._watch = asyncio.create_task(engine._end_when_stuck(config.step_timeout_s), name="engine-watch")
        return engine

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "start() returns loaded engines only"
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the child, for who watches memory."""
        return self._process.pid

    def ask(self, request: Request, listener: Listener) -> None:
        self._listeners.add(request.id, listener)
        try:
            wire, shared = to_wire(request, self._folder.path)
        except BaseException:
            self._listeners.remove(request.id)
            raise
        if shared:
            self._shared[request.id] = shared
        self._send(wire)

    def leave(self, request_id: str) -> None:
        if self._listeners.remove(request_id):
            self._send(Abort(request_id))
            self._remove_arrays()

    async def stats(self) -> EngineStats:
        answer: asyncio.Future[EngineStats | Fault] = asyncio.get_running_loop().create_future()
        self._send(self._listeners.await_stats(partial(_resolve, answer)))
        return stats_or_raise(await answer)

    def alive(self) -> bool:
        return self._listeners.dead is None

    def gone(self) -> bool:
        return not self.alive()

    async def wait_dead(self) -> None:
        """Until the child has ended and whoever waits for it has been told."""
        assert self._reader is not None, "start() returns loaded engines only"
        await asyncio.wait({self._reader})

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="engine-close")
        await asyncio.shield(self._closing)  # whoever stops waiting, it goes on

    async def _close(self) -> None:
        if self._watch:
            self._watch.cancel()
        await self._end_process()
        if self._reader:
            await self._reader
        self._socket.close(linger=0)
        self._socket.context.term()
        self._folder.close()

    async def _end_process(self) -> None:
        try:
            if self._info:
                self._send(Close())
                await asyncio.wait_for(asyncio.shield(self._exit), self.close_timeout_s)
        except asyncio.TimeoutError:
            logger.warning("the engine process did not end within %g s and is killed", self.close_timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._exit

    async def _end_when_stuck(self, step_timeout_s: float) -> None:
        """Ask after every second whether the loop still turns, and end a process that does not answer in time."""
        while self.alive():
            answer = asyncio.gather(self.stats(), return_exceptions=True)  # `close` may leave nobody to take one
            waited_s = 0.0
            while not answer.done() and waited_s < self._patience_s(step_timeout_s):
                await asyncio.wait({answer}, timeout=_LOOK_S)
                waited_s += _LOOK_S
            if not answer.done():
                answer.cancel()
                self._why_ended = f"has not answered for {waited_s:g} s and was ended"
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                return
            if isinstance(answer.result()[0], BaseException):  # it is dead, and the reader says so
                return
            await asyncio.wait({self._exit}, timeout=_LOOK_S)

    def _patience_s(self, step_timeout_s: float) -> float:
        return min(self.stop_timeout_s, step_timeout_s) if is_stopped(self._process.pid) else step_timeout_s

    async def _load(self, start: Start, progress: OnProgress) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        while self._info is None:
            match await self._next_event():
                case Progress(stage, done, total):
                    progress(stage, done, total)
                case Ready(info):
                    self._info = info
                case Failed(fault):
                    raise fault.error()
        self._reader = asyncio.create_task(self._read(), name="engine-events")

    async def _read(self) -> None:
        """Hand out what the child says until it has ended."""
        try:
            while True:
                event = await self._next_event()
                assert not isinstance(event, Progress | Ready), event
                for part in _parts(event):
                    self._listeners.dispatch(part)
                    await asyncio.sleep(0)
                self._remove_arrays()
        except EngineDeadError as error:
            if self._closing:
                self._listeners.end_all(CLOSED, finish=Finish("abort"))
            else:
                logger.error("%s", error)
                self._listeners.end_all(Fault.of(error))
            self._remove_arrays()

    async def _next_event(self) -> WireEvent:
        """Raises EngineDeadError once the child has ended and all that it said was heard.

        One that was killed had no last words, and what it said before may take seconds to hand out.
        """
        receiving = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait({receiving, self._exit}, return_when=asyncio.FIRST_COMPLETED)
        was_killed = self._exit.done() and self._exit.result() < 0
        if not receiving.done() and not was_killed:
            await asyncio.wait({receiving}, timeout=_LAST_WORDS_S)
        if was_killed or not receiving.done():
            receiving.cancel()
            raise EngineDeadError(f"the engine process {self._why_ended or how_it_ended(self._exit.result())}")
        return event_decoder.decode(receiving.result())

    def _remove_arrays(self) -> None:
        """Those of requests that are over."""
        for request_id in [each for each in self._shared if each not in self._listeners]:
            for array in self._shared.pop(request_id):
                array.remove()

    def _send(self, command: WireCommand) -> None:
        # NOBLOCK: without a peer this would wait forever. Nothing is lost: who sent it listens for the answer, and
        # the reader tells all who listen that the child is gone.
        sent = asyncio.ensure_future(self._socket.send(msgspec.msgpack.encode(command), flags=zmq.NOBLOCK))
        sent.add_done_callback(_note_failure)


def _parts(event: Event) -> Iterator[Event]:
    """The news of a step that has very many a few at a time: whoever hears the first writes them before the last are
    heard, and nobody else waits for all of them."""
    if isinstance(event, Outputs) and len(event.outputs) > _OUTPUTS_AT_ONCE:
        for start in range(0, len(event.outputs), _OUTPUTS_AT_ONCE):
            yield Outputs(event.outputs[start : start + _OUTPUTS_AT_ONCE])
    else:
        yield event


def _note_failure(sent: asyncio.Future[Any]) -> None:
    """That the child is gone is told by the reader; nothing else is expected to go wrong."""
    if not sent.cancelled() and (error := sent.exception()) and not isinstance(error, zmq.Again):
        logger.error("a message to the engine process was not sent", exc_info=error)


def _resolve(answer: asyncio.Future[EngineStats | Fault], stats: EngineStats | Fault) -> None:
    if not answer.done():
        answer.set_result(stats)
