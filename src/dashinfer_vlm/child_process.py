"""How a process of our own is started, what its parent asks of it, and how it notices the parent's end: free of torch,
for a child watches its parent before it loads anything."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["exit_with_parent", "how_it_ended", "is_stopped", "running"]

_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()
"""Else Python would import whatever has the name of a module in the working directory, which may be a model's folder;
Python 3.10 cannot be told not to."""


def running(module: str, *args: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command that runs `module` in this interpreter; `options` are the interpreter's."""
    return (sys.executable, *_SAFE_PATH, *options, "-m", module, *args)


def is_stopped(pid: int) -> bool:
    """By SIGSTOP or a debugger, as far as the system tells: it lives, and will not answer."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] in "Tt"
    except OSError:
        return False


def how_it_ended(status: int) -> str:
    """The rest of a sentence about the process whose exit status, as `subprocess` has it, this is."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by signal {signal.Signals(-status).name}"
    except ValueError:  # the real-time signals between the first and the last have no names
        return f"was killed by signal {-status}"


def exit_with_parent(status: int, leave: Callable[[], None] | None = None) -> None:
    """End this process with `status` once standard input ends, after `leave`: nobody holds its other end any more.

    Without exit hooks, since the main thread may be anywhere: in a step, or waiting for who is gone.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        if leave is not None:
            leave()
        os._exit(status)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
