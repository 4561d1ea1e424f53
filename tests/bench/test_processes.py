"""A server's process tree: whole, weighed, and held still on demand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dashinfer_vlm.bench.processes import MemoryWatch, ProcessTree
from dashinfer_vlm.errors import ConfigError

MIB = 2**20
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "b = bytearray(b'x') * (64 << 20); print('up', flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
child.communicate(b"\\n")
"""


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """Ids of a process and of its child, which holds 64 MiB."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        yield parent.pid, int(parent.stdout.readline())
        parent.communicate("\n", timeout=30)


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_tree_has_the_process_and_its_descendants(family: tuple[int, int]) -> None:
    assert ProcessTree(family[0]).members() == list(family)


def test_memory_is_that_of_the_whole_tree(family: tuple[int, int]) -> None:
    parent, child = (ProcessTree(pid).memory_bytes() for pid in family)

    assert 64 * MIB < child < 128 * MIB
    assert child < parent


def test_a_paused_tree_stands_still_until_it_is_resumed(family: tuple[int, int]) -> None:
    tree = ProcessTree(family[0])
    with tree.paused():
        os.waitid(os.P_PID, family[0], os.WSTOPPED)
        assert state(family[0]) == "T"
    os.waitid(os.P_PID, family[0], os.WCONTINUED)
    assert state(family[0]) != "T"


async def test_the_peak_of_a_watched_tree_is_kept(family: tuple[int, int]) -> None:
    async with MemoryWatch(ProcessTree(family[0])) as watch:
        pass

    assert watch.peak_bytes > 64 * MIB


def test_a_process_that_is_gone_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(ConfigError, match=f"--pid {ended.pid}: there is no such process"):
        ProcessTree(ended.pid).members()
