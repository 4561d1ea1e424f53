"""What a server's processes hold: memory, descriptors, threads, files in shared memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dashinfer_vlm.bench.processes import ProcessTree

__all__ = ["SHARED", "Vitals", "shared_folders", "take_vitals"]

SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Vitals:
    """A moment."""

    at_s: float
    memory: int
    """Bytes; a page that several processes share counts once."""
    memory_of_each: dict[str, int]
    """The same by what a process is."""
    descriptors: int
    threads: int
    processes: int
    shared: int
    """Bytes of the server's files in shared memory."""


def take_vitals(tree: ProcessTree) -> Vitals:
    """Of the tree now; a process that ends meanwhile counts for nothing."""
    members = tree.members()
    memory = tree.memory_of_each()
    by_name: Counter[str] = Counter()
    for pid, size in memory.items():
        by_name[_name(pid)] += size
    return Vitals(
        at_s=time.perf_counter(),
        memory=sum(memory.values()),
        memory_of_each=dict(by_name),
        descriptors=sum(_count(pid, "fd") for pid in members),
        threads=sum(_count(pid, "task") for pid in members),
        processes=len(members),
        shared=sum(_size(file) for folder in shared_folders(members) for file in folder.rglob("*")),
    )


def shared_folders(pids: Iterable[int]) -> set[Path]:
    """Folders in shared memory that processes `pids` have made, also those that have ended."""
    return {folder for pid in pids for folder in SHARED.glob(f"dashinfer-{pid}-*")}


def _name(pid: int) -> str:
    """The module that a process of Python's runs, or its program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:  # it has ended
        return "gone"
    return words[words.index("-m") + 1] if "-m" in words[:-1] else Path(words[1 if words[1:2] else 0]).name


def _count(pid: int, kind: str) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/{kind}").iterdir())
    except OSError:  # it has ended
        return 0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it is gone
        return 0
