"""The process tree of a server on this machine (Linux): its memory, and holding it still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dashinfer_vlm.errors import ConfigError

__all__ = ["MemoryWatch", "ProcessTree"]

_PROC = Path("/proc")
_SAMPLE_EVERY_S = 1.0
_SAMPLE_SHARE = 0.01
"""Reading the size of a large process takes tens of milliseconds; this much of one core may go into it."""


@dataclass(frozen=True, slots=True)
class ProcessTree:
    """A process and all its descendants."""

    pid: int

    def members(self) -> list[int]:
        """Ids, parents before children; raises ConfigError when the process itself is gone."""
        children = _children()
        if self.pid not in children and not (_PROC / str(self.pid)).is_dir():
            raise ConfigError(f"--pid {self.pid}: there is no such process")
        found = [self.pid]
        for pid in found:  # grows while it is read
            found += children.get(pid, [])
        return found

    def memory_bytes(self) -> int:
        """Resident memory; a page that several processes share counts once (sum of proportional set sizes)."""
        return sum(self.memory_of_each().values())

    def memory_of_each(self) -> dict[int, int]:
        """The same by process."""
        return {pid: _pss_bytes(pid) for pid in self.members()}

    def pause(self) -> None:
        """Stop every process of the tree, also those that are born meanwhile."""
        stopped: set[int] = set()
        while fresh := set(self.members()) - stopped:
            self._signal(fresh, signal.SIGSTOP)
            stopped |= fresh

    def resume(self) -> None:
        self._signal(set(self.members()), signal.SIGCONT)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the tree still within the block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _signal(self, pids: set[int], number: signal.Signals) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # ended by itself
            except PermissionError as error:
                raise ConfigError(f"--pid: process {pid} belongs to another user") from error


class MemoryWatch:
    """Samples the memory of a tree while it is used as an async context manager; `peak_bytes` is the largest."""

    def __init__(self, tree: ProcessTree) -> None:
        self.tree = tree
        self.peak_bytes = 0

    async def __aenter__(self) -> MemoryWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._sample()

    async def _watch(self) -> None:
        while True:
            cost_s = await asyncio.to_thread(self._sample)
            await asyncio.sleep(max(_SAMPLE_EVERY_S, cost_s / _SAMPLE_SHARE))

    def _sample(self) -> float:
        start_s = time.perf_counter()
        self.peak_bytes = max(self.peak_bytes, self.tree.memory_bytes())
        return time.perf_counter() - start_s


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended while the folder was read
            parent = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
            children.setdefault(parent, []).append(int(entry.name))
    return children


def _pss_bytes(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # ended meanwhile
    except PermissionError as error:
        raise ConfigError(f"--pid: the memory of process {pid} cannot be read; run as the same user") from error
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)
