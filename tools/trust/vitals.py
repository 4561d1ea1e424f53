"""What a server's processes hold: memory, descriptors, threads, files in shared memory."""

from __future__ import annotations

import time
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
    descriptors: int
    threads: int
    processes: int
    shared: int
    """Bytes of the server's files in shared memory."""


def take_vitals(tree: ProcessTree) -> Vitals:
    """Of the tree now; a process that ends meanwhile counts for nothing."""
    members = tree.members()
    return Vitals(
        at_s=time.perf_counter(),
        memory=tree.memory_bytes(),
        descriptors=sum(_count(pid, "fd") for pid in members),
        threads=sum(_count(pid, "task") for pid in members),
        processes=len(members),
        shared=sum(_size(file) for folder in shared_folders(members) for file in folder.rglob("*")),
    )


def shared_folders(pids: Iterable[int]) -> set[Path]:
    """Folders in shared memory that processes `pids` have made, also those that have ended."""
    return {folder for pid in pids for folder in SHARED.glob(f"dashinfer-{pid}-*")}


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
