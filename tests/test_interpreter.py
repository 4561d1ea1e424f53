"""Our other processes import what this one does, wherever it was started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dashinfer_vlm.interpreter import running

SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot be told")
def test_no_file_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    """As when a server is started in the folder of a model that somebody else has made."""
    (tmp_path / "inspect.py").write_text("raise SystemExit('code of the folder runs')")
    command = running("dashinfer_vlm.media.decode", "2048")
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_process_is_started_so() -> None:
    starting = [path.name for path in SOURCE.rglob("*.py") if '"-m"' in path.read_text()]
    assert starting == ["interpreter.py"]
