from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dashinfer_vlm.child_process import how_it_ended, is_stopped, running

SOURCE = Path(__file__).resolve().parents[1] / "src"

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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot be told")
def test_no_file_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    """As when a server is started in the folder of a model that somebody else has made."""
    (tmp_path / "inspect.py").write_text("raise SystemExit('code of the folder runs')")
    command = running("dashinfer_vlm.media.decode", "2048")
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_process_is_started_so() -> None:
    starting = [path.name for path in SOURCE.rglob("*.py") if '"-m"' in path.read_text()]
    assert starting == ["child_process.py"]
