"""The first rank's view of the others: starts them, tells them what to do, and notices when one has ended."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from dataclasses import replace

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray
from torch import distributed

from dashinfer_vlm.child_process import how_it_ended, running
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.cards.calls import Call
from dashinfer_vlm.engine.parallel.meeting import leave
from dashinfer_vlm.engine.parallel.wire import (
    BeginEncoding,
    EncodeSlices,
    FinishEncoding,
    LoadFailed,
    MakeCall,
    Order,
    Start,
    news_decoder,
)
from dashinfer_vlm.errors import ConfigError, EngineDeadError
from dashinfer_vlm.kernels.threads import engine_threads
from dashinfer_vlm.request import Grid
from dashinfer_vlm.shared_array import SharedFolder

__all__ = ["RankProcesses"]

_LOOK_MS = 50
_LAST_WORDS_MS = 500
"""How long a message may still be in the socket after the process that sent it has ended."""
_END_TIMEOUT_S = 5.0


class RankProcesses:
    """All ranks but the first, each a child process. Belongs to the engine's thread.

    They end with their parent. When one of them ends by itself, the model is gone: every call raises EngineDeadError.
    """

    command: tuple[str, ...] = running("dashinfer_vlm.engine.parallel.rank")

    def __init__(self, config: EngineConfig) -> None:
        """They load from now on; `wait_loaded` waits for them. Raises ConfigError in a process that has others."""
        if distributed.is_initialized():
            raise ConfigError("--parallel-size: a process shares one model at a time, on cards one in its life")
        self._folder = SharedFolder()
        self.meeting = f"{self._folder.path}/meeting"
        self._context = zmq.Context()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._have_loaded = False
        own = replace(config, threads=engine_threads(config), cores=None)
        for index in range(1, config.parallel_size):
            self._spawn(index, own)

    def _spawn(self, index: int, config: EngineConfig) -> None:
        address = f"ipc://{self._folder.path}/rank-{index}"
        socket = self._sockets[index] = self._context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.bind(address)
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, start_new_session=True)
        self._processes[index] = process
        start = Start(address, config, index, self.meeting, logging.getLogger().getEffectiveLevel())
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died already, and `wait_loaded` says so
            process.stdin.write(msgspec.json.encode(start) + b"\n")
            process.stdin.flush()

    def wait_loaded(self) -> None:
        """Until every rank has its part of the model; raises what one of them has failed with."""
        for index, socket in self._sockets.items():
            while not socket.poll(_LOOK_MS):
                if self._processes[index].poll() is not None and not socket.poll(_LAST_WORDS_MS):
                    self.check()
            news = news_decoder.decode(socket.recv())
            if isinstance(news, LoadFailed):
                raise news.fault.error()
        self._have_loaded = True

    def check(self, *, patience_s: float = 0.0) -> None:
        """Raise EngineDeadError when a rank has ended, or does so within `patience_s`."""
        until = time.monotonic() + patience_s
        while True:
            for index, process in self._processes.items():
                status = process.poll()
                if status is not None:
                    raise EngineDeadError(f"rank {index} of the model {how_it_ended(status)}")
            if time.monotonic() >= until:
                return
            time.sleep(0.01)

    def call(self, call: Call, flat: NDArray[np.uint8]) -> None:
        self.check()
        for socket in self._sockets.values():
            socket.send_multipart([msgspec.msgpack.encode(MakeCall(call)), flat.tobytes()], flags=zmq.NOBLOCK)

    def begin_encoding(self, index: int, grids: list[Grid]) -> None:
        self._tell(index, BeginEncoding(grids))

    def encode_slices(self, index: int, count: int) -> None:
        self._tell(index, EncodeSlices(count))

    def finish_encoding(self, index: int) -> None:
        self._tell(index, FinishEncoding())

    def _tell(self, index: int, order: Order) -> None:
        self.check()
        self._sockets[index].send(msgspec.msgpack.encode(order), flags=zmq.NOBLOCK)

    def close(self) -> None:
        """End them and wait for their end; idempotent."""
        leave()
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # which it takes as a request to end
            if not self._have_loaded:  # it may be busy for long
                process.kill()
        for process in self._processes.values():
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._context.destroy(linger=0)
        self._folder.close()
