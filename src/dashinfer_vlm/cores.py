"""Which processor cores this process may compute on, which of them belong to which of our processes, and where their
memory is. Everything is read from the Linux kernel's own files; elsewhere there are cores, and nothing is known of
them.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dashinfer_vlm.cgroups import cpu_quota
from dashinfer_vlm.errors import ConfigError

__all__ = ["claim", "memory_nodes", "parse_list", "usable_cores"]

_claims: dict[int, socket.socket] = {}
"""Cores that this process has pinned threads to. A name in the abstract namespace is free again when its process ends,
however it ends."""


def usable_cores(root: Path = Path("/")) -> list[int]:
    """One logical processor of each physical core in this process's affinity mask, in order; no more of them than the
    container's CPU quota pays for, since threads beyond it would stop all others when it is used up."""
    allowed = _allowed()
    cores = [cpu for cpu in allowed if cpu == min(_siblings(root, cpu) & set(allowed))]
    quota = cpu_quota(root)
    return cores if quota is None else cores[: max(1, int(quota))]


def parse_list(text: str) -> list[int]:
    """`0-3,8` as numbers in ascending order, each once; raises ConfigError for another form."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text.strip()):
        raise ConfigError(f"{text!r} is not a list of cores; write numbers and ranges, such as 0-3,8")
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def memory_nodes(cores: Sequence[int], root: Path = Path("/")) -> list[int]:
    """NUMA nodes that `cores` belong to, in order; empty where the system tells of none."""
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        local = (folder / "cpulist").read_text().strip()  # empty: a node without processors
        if local and set(parse_list(local)) & set(cores):
            nodes.append(int(folder.name.removeprefix("node")))
    return sorted(nodes)


def claim(cores: Sequence[int]) -> None:
    """Make `cores` this process's own until it ends. Raises ConfigError when one is outside the affinity mask or pinned
    by another of our processes; cores that are its own already stay so."""
    allowed = set(_allowed())
    for core in cores:
        if core not in allowed:
            raise ConfigError(f"--cores names core {core}; this process may use {_ranges(sorted(allowed))}")
        if core in _claims or sys.platform != "linux":
            continue
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            name.bind(f"\0dashinfer-vlm core {core}")
        except OSError as error:
            name.close()
            raise ConfigError(
                f"core {core} is pinned by another process of dashinfer-vlm; give each its own --cores"
            ) from error
        _claims[core] = name


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(root: Path, cpu: int) -> set[int]:
    """The logical processors of `cpu`'s physical core, itself included."""
    file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return {cpu, *parse_list(file.read_text())} if file.exists() else {cpu}


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `0-3,8`."""
    text = ""
    for i, number in enumerate(numbers):
        if i and number == numbers[i - 1] + 1:
            text = re.sub(r"(^|,)(\d+)(-\d+)?$", rf"\1\2-{number}", text)
        else:
            text += f"{',' if i else ''}{number}"
    return text
