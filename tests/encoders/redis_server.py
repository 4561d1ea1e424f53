"""A real redis-server of one's own: on a free port, in a folder of its own, to be stopped and killed at will."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["RedisServer", "start_redis"]

BINARY = shutil.which("redis-server")


class RedisServer:
    """Started by the constructor, which returns when it answers."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.port = port or _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process = self._start()
        self.client = self._connect()

    def _start(self) -> subprocess.Popen[str]:
        assert BINARY
        command = [BINARY, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(
            [*command, "--dir", str(self._folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout
        for line in process.stdout:
            if "Ready to accept connections" in line:
                return process
        raise AssertionError(f"redis-server ended with {process.wait()}")

    def _connect(self) -> Any:
        from redis import Redis

        return Redis(host="127.0.0.1", port=self.port, protocol=2)

    def restart(self) -> None:
        """Come back, empty, on the same port."""
        self.kill()
        self._process = self._start()

    def freeze(self) -> None:
        """Accept connections, answer nothing: what a machine in deep trouble does."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def close(self) -> None:
        self.client.close()
        if self._process.poll() is None:
            self.kill()


def start_redis(folder: Path) -> Iterator[RedisServer]:
    """For fixtures: skips where there is no redis-server."""
    if BINARY is None:
        pytest.skip("needs the program redis-server (Debian: apt-get install redis-server)")
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
