"""An engine in a thread of this process: for the offline API, `allspark`, and tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import Listener, OnProgress
from dashinfer_vlm.engine.host.loop import EngineLoop, SteppedEngine
from dashinfer_vlm.engine.host.streams import CLOSED, Listeners, silent, stats_or_raise
from dashinfer_vlm.engine.host.wire import Abort, Close, Command, Event
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.forked import check_process
from dashinfer_vlm.request import Finish, Output, Request

__all__ = ["LocalEngine"]


class LocalEngine:
    """An engine whose loop runs in a thread of this process. Its methods may be called from any thread and loop."""

    def __init__(self, engine: SteppedEngine, info: EngineInfo, *, owned: bool = False) -> None:
        """An engine that is `owned` is closed with this object."""
        self._info = info
        self._owned = owned
        self._listeners = Listeners()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._over: Future[None] = Future()
        self._over.set_running_or_notify_cancel()  # nobody can cancel it: the engine's thread sets it when it ends
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, args=(engine,), name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, config: EngineConfig, *, progress: OnProgress | None = None) -> LocalEngine:
        """Load the model of `config` and start its loop; raises CheckpointError or ConfigError."""
        return cls(*load_engine(config, progress or silent), owned=True)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, request: Request, listener: Listener) -> None:
        """Run `request`; `listener` hears its news in the engine's thread. Raises EngineDeadError, also in a process
        that was forked from the engine's."""
        check_process(self._pid)
        self._listeners.add(request.id, listener)
        self._commands.put(request)

    def abort(self, request_id: str) -> None:
        """End a request early; its listener still hears the final Output."""
        self._commands.put(Abort(request_id))

    def ask(self, request: Request, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        self.submit(request, lambda news: _in_loop(loop, listener, news))

    def leave(self, request_id: str) -> None:
        if self._listeners.remove(request_id):
            self.abort(request_id)

    def read_stats(self) -> EngineStats:
        """`stats()` for callers without an event loop."""
        return stats_or_raise(self._ask_stats().result())

    async def stats(self) -> EngineStats:
        return stats_or_raise(await asyncio.wrap_future(self._ask_stats()))

    def alive(self) -> bool:
        return self._listeners.dead is None

    def gone(self) -> bool:
        return not self.alive()

    def shutdown(self) -> None:
        """`close()` for callers without an event loop: returns when the engine's thread has ended."""
        self._commands.put(Close())
        if threading.current_thread() is not self._thread:  # the collector of garbage runs in any thread
            self._thread.join()

    async def close(self) -> None:
        """Without another thread: at the interpreter's exit none can be started."""
        self._commands.put(Close())
        await asyncio.wrap_future(self._over)
        self._thread.join()

    def _ask_stats(self) -> Future[EngineStats | Fault]:
        check_process(self._pid)
        answer: Future[EngineStats | Fault] = Future()
        answer.set_running_or_notify_cancel()  # nobody can cancel it any more: the engine's thread sets it
        self._commands.put(self._listeners.await_stats(answer.set_result))
        return answer

    def _run(self, engine: SteppedEngine) -> None:
        try:
            self._serve(engine)
        finally:
            self._over.set_result(None)

    def _serve(self, engine: SteppedEngine) -> None:
        try:
            EngineLoop(engine, _QueueChannel(self._commands, self._listeners.dispatch)).run()
            if self._owned:
                engine.close()
        except BaseException as error:  # the loop survives what it can; nobody may wait for the rest
            self._listeners.end_all(Fault("EngineDeadError", f"the engine's thread ended by {type(error).__name__}"))
            raise
        self._listeners.end_all(CLOSED, finish=Finish("abort"))


class _QueueChannel:
    def __init__(self, commands: queue.SimpleQueue[Command], send: Callable[[Event], None]) -> None:
        self._commands = commands
        self.send = send

    def receive(self, *, wait: bool) -> list[Command]:
        commands = [self._commands.get()] if wait else []
        while not self._commands.empty():  # nobody else takes from it
            commands.append(self._commands.get())
        return commands


def _in_loop(loop: asyncio.AbstractEventLoop, call: Listener, news: Output | Fault) -> None:
    """Call in `loop` from the engine's thread; a loop that was closed meanwhile wants no news any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, news)
