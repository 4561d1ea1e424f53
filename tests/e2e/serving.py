"""A real `dashinfer_vlm_serve` as a child process, and what a person at its terminal can do to it."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["START_TIMEOUT_S", "Server", "descendants", "run_to_end"]

START_TIMEOUT_S = 180.0
"""Two cores that also do other things; alone it takes about ten seconds."""
_SCRIPT = Path(sys.executable).with_name("dashinfer_vlm_serve")
_COMMAND = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "dashinfer_vlm.cli.serve"]
_READY = re.compile(r"Uvicorn running on (\S+) \(Press CTRL\+C to quit\)")


class Server:
    """Started by the constructor in a session of its own; `wait_ready` returns its address."""

    def __init__(self, *flags: str, env: Mapping[str, str] | None = None, under: Sequence[str] = ()) -> None:
        """`under` is a command that becomes the server, such as `unshare --mount`."""
        self.process = subprocess.Popen(
            [*under, *_COMMAND, *flags],
            env=_environment(env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = ""
        self.children: set[int] = set()
        """Process ids of its descendants at the time it was ready."""

    def wait_ready(self) -> str:
        self.address = self.wait_line(_READY).group(1)
        self.children = descendants(self.process.pid)
        return self.address

    def wait_line(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The first line from here on that matches; fails with the whole log when the server ends before."""
        while (line := self._lines.get(timeout=START_TIMEOUT_S)) is not None:
            if found := pattern.search(line):
                return found
        raise AssertionError(f"the server ended without {pattern.pattern!r}:\n{self.text}")

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_end(self, timeout_s: float = 60.0) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stderr
        self.process.stderr.close()

    @property
    def text(self) -> str:
        return "".join(self.log)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)


def run_to_end(*flags: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A server that is not expected to get as far as serving."""
    command = [*_COMMAND, *flags]
    return subprocess.run(command, env=_environment(env), capture_output=True, text=True, timeout=START_TIMEOUT_S)


def descendants(pid: int) -> set[int]:
    """Process ids of all children, grandchildren and so on of `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found.update(children)
        waiting.extend(children)
    return found


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("DASHINFER_")}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return own | paths | {"NO_PROXY": "*", "COLUMNS": "120"} | dict(extra or {})
