"""The engine process: `python -m dashinfer_vlm.engine.host.child`, started by `process.ProcessEngine` and by nobody
else.

Standard input carries one line of JSON (`wire.Start`) and then stays open for the parent's life: its end means that
the parent is gone, and so is this process. Commands and events go over one ZeroMQ pair. torch comes with the engine: it
takes a second or two, in which the parent is watched already.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable

import msgspec
import zmq

from dashinfer_vlm.allocator import keep_freed_memory
from dashinfer_vlm.child_process import exit_with_parent
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.client import OnProgress
from dashinfer_vlm.engine.host.loop import EngineLoop, SteppedEngine
from dashinfer_vlm.engine.host.mapping import from_wire, lost_arrays
from dashinfer_vlm.engine.host.wire import (
    Command,
    Event,
    Failed,
    Progress,
    Ready,
    Refused,
    Start,
    WireEvent,
    WireRequest,
    command_decoder,
)
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.shared_array import leave

logger = logging.getLogger(__name__)

Loader = Callable[[EngineConfig, OnProgress], tuple[SteppedEngine, EngineInfo]]

_LINGER_MS = 2000
"""How long the last events may take to leave."""


class SocketChannel:
    """The loop's channel over a ZeroMQ socket."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # a parent that is busy for a moment must not stop the step of everyone
        self._socket.connect(address)

    def receive(self, *, wait: bool) -> list[Command]:
        if wait:
            self._socket.poll()
        commands: list[Command] = []
        while self._socket.poll(0):
            commands += self._decode(self._socket.recv())
        return commands

    def send(self, event: Event | WireEvent) -> None:
        self._socket.send(msgspec.msgpack.encode(event))

    def close(self) -> None:
        self._context.destroy(linger=_LINGER_MS)

    def _decode(self, message: bytes) -> list[Command]:
        command = command_decoder.decode(message)
        if not isinstance(command, WireRequest):
            return [command]
        try:
            return [from_wire(command)]
        except OSError as error:
            self.send(Refused(command.id, Fault.of(lost_arrays(command.id, error))))
            return []


def serve(load: Loader) -> int:
    """Be the engine process: load, then run the loop until the parent closes it. Returns the exit status."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    exit_with_parent(1, leave)
    start.log.apply()
    channel = SocketChannel(start.address)
    try:
        engine, info = load(start.config, lambda stage, done, total: channel.send(Progress(stage, done, total)))
    except Exception as error:
        if not isinstance(error, DashInferError):
            logger.exception("loading failed")
        channel.send(Failed(Fault.of(error)))
        return 1
    else:
        gc.collect()
        gc.freeze()  # a full collection over the modules and the model would stop every stream for a tenth of a second
        channel.send(Ready(info))
        try:
            EngineLoop(engine, channel).run()
        finally:
            engine.close()
        return 0
    finally:
        channel.close()


def main() -> int:
    return serve(_load)


def _load(config: EngineConfig, progress: OnProgress) -> tuple[SteppedEngine, EngineInfo]:
    from dashinfer_vlm.engine.grammars.compiler import MAX_WAITING
    from dashinfer_vlm.engine.load import load_engine

    keep_freed_memory()
    return load_engine(config, progress, max_waiting_grammars=MAX_WAITING)


if __name__ == "__main__":
    sys.exit(main())
