"""A Ray cluster on this machine: a head without encoders, and machines that are lent by the real command."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

JOIN_TIMEOUT_S = 150.0
JOINED = "will now block forever"
"""What `ray start --block` says when its node is up."""


class Node:
    """`dashinfer-vlm encoder --join`, with room for one encoder."""

    def __init__(self, address: str) -> None:
        command = "from dashinfer_vlm.cli.tool import main; main()"
        self._process = subprocess.Popen(
            (sys.executable, "-c", command, "encoder", "--join", address, "--threads", "1"),
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said: list[str] = []
        self._joined = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._joined.wait(JOIN_TIMEOUT_S):
            self.kill()
            raise RuntimeError("the node did not join:\n" + "".join(self._said))

    @property
    def processes(self) -> list[int]:
        """Everything that the command has started, and what that has started."""
        return _descendants(self._process.pid)

    @property
    def actors(self) -> list[int]:
        """The processes in which encoders run."""
        return [pid for pid in self.processes if "EncoderActor" in _command_line(pid)]

    def kill(self) -> None:
        """As when the machine loses its power."""
        for pid in [self._process.pid, *self.processes]:
            _kill(pid)
        self._end()

    def leave(self) -> list[int]:
        """As Ctrl-C does; the processes that were part of the node."""
        processes = self.processes
        self._process.send_signal(signal.SIGINT)
        self._end()
        return processes

    @property
    def is_there(self) -> bool:
        return self._process.poll() is None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            if JOINED in line:
                self._joined.set()

    def _end(self) -> None:
        self._process.wait(60)
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Cluster:
    """The head, on a free port of loopback, and the nodes that have joined."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's socket names leave no room for a longer one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        port = self.address.split(":")[1]
        ray = (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats")
        sizes = ("--num-cpus=0", "--object-store-memory=100000000", "--include-dashboard=false")
        where = (f"--port={port}", f"--temp-dir={self._folder}", "--node-ip-address=127.0.0.1")
        self._head = subprocess.Popen((*ray, *sizes, *where), stdout=subprocess.PIPE, text=True)
        assert self._head.stdout is not None
        if not any(JOINED in line for line in self._head.stdout):
            raise RuntimeError("the head of the Ray cluster does not start")

    def join(self) -> Node:
        """One more machine."""
        self.nodes = [node for node in self.nodes if node.is_there]
        self.nodes.append(Node(self.address))
        return self.nodes[-1]

    def close(self) -> None:
        for node in self.nodes:
            if node.is_there:
                node.kill()
        for pid in [self._head.pid, *_descendants(self._head.pid)]:
            _kill(pid)
        self._head.wait()
        assert self._head.stdout is not None
        self._head.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in tasks.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
