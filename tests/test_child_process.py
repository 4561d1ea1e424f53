from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from dashinfer_vlm.child_process import how_it_ended, is_stopped

WATCHED = """
import time
from dashinfer_vlm.child_process import exit_with_parent
exit_with_parent(7, lambda: print("left", flush=True))
print("watching", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (0, "ended with status 0"),
        (3, "ended with status 3"),
        (-9, "was killed by signal SIGKILL"),
        (-(signal.SIGRTMIN + 1), f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_how_a_process_ended_is_told_in_words(status: int, told: str) -> None:
    assert how_it_ended(status) == told


def test_a_process_ends_with_who_holds_its_standard_input() -> None:
    with subprocess.Popen([sys.executable, "-c", WATCHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"watching\n"
        assert not is_stopped(process.pid)
        process.stdin.write(b"words\n")
        process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == 7
        assert process.stdout.read() == b"left\n"


def test_a_process_that_is_gone_is_not_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert not is_stopped(process.pid)
