"""A server for one client: on a free port of this machine, behind a key of its own, gone when the client is."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import httpx

from dashinfer_vlm.child_process import running
from dashinfer_vlm.errors import DashInferError

__all__ = ["own_server"]

_HOST = "127.0.0.1"
_LOOK_S = 0.1
"""How often it is asked whether it is ready; loading takes seconds to minutes."""


@contextmanager
def own_server(model: str, flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """URL and key of a server of `model`, the bundled one when empty, that is ready; `flags` are its further flags.

    It writes its progress and warnings to this terminal. Raises DashInferError when it does not start.
    """
    key = secrets.token_urlsafe(32)
    url = f"http://{_HOST}:{_free_port()}"
    command = [*running("dashinfer_vlm.cli.serve", "--log-level", "warning", "--no-ui", *flags)]
    command += ["--host", _HOST, "--port", url.rpartition(":")[2], *(["--model", model] if model else [])]
    # the key stays out of the list of processes; a session of its own, since Ctrl-C ends an answer and not the server
    environment = {**os.environ, "DASHINFER_API_KEYS": key}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # else it would outlive a client that is told to end
        signal.signal(number, _leave)
    try:
        _wait(process, url)
        yield url, key
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(_LOOK_S)
    raise DashInferError(f"the server ended with status {process.returncode} before it was ready")


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
