"""Encoders in child processes, each with the ViT's weights on a device or on cores of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
import zmq

from dashinfer_vlm.child_process import how_it_ended, is_stopped, running
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.elsewhere.crew import EncoderDiedError, EncodeRefusedError, NoPlaceError
from dashinfer_vlm.encoders.elsewhere.wire import (
    EncodeJob,
    JobDone,
    JobRefused,
    Picture,
    Reply,
    Start,
    WorkerFailed,
    WorkerReady,
    WorkerWaits,
    dtype_name,
    read_tensor,
    reply_decoder,
    write_tensor,
)
from dashinfer_vlm.encoders.queue import grid, raw_patches
from dashinfer_vlm.errors import EngineError
from dashinfer_vlm.log_lines import LogStyle
from dashinfer_vlm.request import Item
from dashinfer_vlm.shared_array import SharedFolder

START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 600.0
"""A worker that needs longer for one batch hangs and is killed."""
STOP_TIMEOUT_S = 10.0
"""How long it may be stopped by a signal, as a debugger does, while somebody waits for it."""
_LOOK_MS = 50
"""How often one who waits for a reply looks whether the worker lives. The reply itself is heard at once."""
_LAST_WORDS_MS = 200
"""How long a reply may still be in the socket after the process that sent it has ended."""
_END_TIMEOUT_S = 2.0

_numbers = itertools.count()


class ProcessEncoder:
    """One child process; see `crew.Encoder`."""

    module = "dashinfer_vlm.encoders.elsewhere.worker"

    def __init__(
        self, config: EngineConfig, folder: SharedFolder, dtype: torch.dtype, module: str | None = None
    ) -> None:
        """`config` is the worker's own, with its number of threads; `dtype` is that of the embeddings it makes."""
        self._command = running(module or self.module)
        self._config = config
        self._folder = folder
        self._dtype = dtype
        self._waits_because = ""  # empty: it does not wait for a place
        self._process: subprocess.Popen[bytes] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, for who watches memory; None while there is no process."""
        return self._process.pid if self._process is not None and self.is_alive() else None

    def start(self) -> None:
        """Start the process and wait until it has loaded its weights; raises what it says.

        A process that waits for a place is not started again, but asked whether it has one.
        """
        if not (self._waits_because and self.is_alive()):
            self._spawn()
        elif self._socket is not None and not self._socket.poll(0):
            raise NoPlaceError(self._waits_because)
        try:
            reply = self._receive(START_TIMEOUT_S)
        except EncoderDiedError as error:
            self.stop()
            raise EngineError(f"the vision worker does not come up: {error}") from error
        if isinstance(reply, WorkerFailed):
            self.stop()
            raise reply.fault.error()
        self._waits_because = reply.why if isinstance(reply, WorkerWaits) else ""
        if self._waits_because:
            raise NoPlaceError(self._waits_because)
        assert isinstance(reply, WorkerReady), reply

    def _spawn(self) -> None:
        self.stop()
        address = f"ipc://{self._folder.path}/worker-{next(_numbers)}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind(address)
        environment = os.environ | ({"OMP_NUM_THREADS": str(self._config.threads)} if self._config.threads else {})
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, env=environment, start_new_session=True
        )  # a session of its own: Ctrl-C reaches the parent only
        self._introduce(address)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def encode(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """One private [tokens_i, hidden] per item, in CPU memory."""
        number = next(_numbers)
        try:
            self._send(EncodeJob(number, tuple(self._picture(item, number, i) for i, item in enumerate(items))))
            reply = self._receive(JOB_TIMEOUT_S)
            if isinstance(reply, JobRefused):
                raise EncodeRefusedError(reply.message)
            assert isinstance(reply, JobDone), reply
            assert reply.id == number, (reply.id, number)
            return [read_tensor(embedding) for embedding in reply.embeddings]
        finally:
            for path in self._folder.path.glob(f"{number}-*"):  # also what a worker left that died
                path.unlink(missing_ok=True)

    def interrupt(self) -> None:
        """Kill the process; the thread that waits for it hears of it."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """End the process and wait for its end."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it may have died before it read its first line
                self._process.stdin.close()  # which it takes as a request to end
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._context is not None:
            self._context.destroy(linger=0)
        self._process = self._socket = self._context = None
        self._waits_because = ""

    def _introduce(self, address: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        start = Start(address, self._config, str(self._folder.path), dtype_name(self._dtype), LogStyle.current())
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        self._process.stdin.flush()

    def _picture(self, item: Item, number: int, index: int) -> Picture:
        patches = raw_patches(item)
        tensor = torch.from_numpy(np.asarray(patches)) if isinstance(patches, np.ndarray) else patches
        file = write_tensor(self._folder.path, tensor, f"{number}-patches-{index}")
        return Picture(file, grid(item), item.content_hash, item.num_rows)

    def _send(self, job: EncodeJob) -> None:
        assert self._socket is not None
        try:
            self._socket.send(msgspec.msgpack.encode(job), flags=zmq.NOBLOCK)
        except zmq.Again as error:
            raise EncoderDiedError("the vision worker has hung up") from error

    def _receive(self, timeout_s: float) -> Reply:
        assert self._process is not None
        assert self._socket is not None
        start_s = time.monotonic()
        while not self._socket.poll(_LOOK_MS):
            status = self._process.poll()
            if status is not None and not self._socket.poll(_LAST_WORDS_MS):
                raise EncoderDiedError(f"the vision worker {how_it_ended(status)}")
            patience_s = min(STOP_TIMEOUT_S, timeout_s) if is_stopped(self._process.pid) else timeout_s
            if time.monotonic() - start_s > patience_s:
                self._process.kill()
                raise EncoderDiedError(f"the vision worker gave no answer for {patience_s:g} s and was killed")
        return reply_decoder.decode(self._socket.recv())
