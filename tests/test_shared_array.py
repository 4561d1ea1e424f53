from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dashinfer_vlm.shared_array import SharedArray, SharedFolder, put


@pytest.fixture
def folder(tmp_path: Path) -> SharedFolder:
    return SharedFolder(tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_an_array_survives_a_message(folder: SharedFolder, dtype: str) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    message = msgspec.msgpack.encode(folder.put(array))
    shared = msgspec.msgpack.decode(message, type=SharedArray)
    assert np.array_equal(shared.open(), array)
    assert shared.nbytes == array.nbytes


def test_a_strided_array_is_shared_by_value(folder: SharedFolder) -> None:
    array = np.arange(40).reshape(5, 8)[::2, ::-3]
    assert np.array_equal(folder.put(array).open(), array)


def test_a_reader_cannot_write(folder: SharedFolder) -> None:
    opened = folder.put(np.zeros(3)).open()
    with pytest.raises(ValueError, match="read-only"):
        opened[0] = 1


def test_an_empty_array_is_refused(folder: SharedFolder) -> None:
    with pytest.raises(ValueError, match=r"empty array of shape \(0, 4\)"):
        folder.put(np.zeros((0, 4)))


def test_a_name_is_never_used_twice(folder: SharedFolder) -> None:
    folder.put(np.zeros(3), "same")
    with pytest.raises(FileExistsError):
        folder.put(np.ones(3), "same")


def test_a_removed_array_stays_readable_where_it_is_open(folder: SharedFolder) -> None:
    shared = folder.put(np.arange(5))
    opened = shared.open()
    shared.remove()
    shared.remove()
    assert opened.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FileNotFoundError):
        shared.open()


def test_close_removes_the_folder_once(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path)
    folder.put(np.zeros(3))
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_may_look_into_a_folder(folder: SharedFolder) -> None:
    assert folder.path.stat().st_mode & 0o777 == 0o700


OWNER = """
import sys, pathlib, numpy
from dashinfer_vlm.shared_array import SharedFolder
folder = SharedFolder(pathlib.Path(sys.argv[1]))
folder.put(numpy.zeros(3))
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_owner_is_swept_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = Path(owner.stdout.readline().strip())
        SharedFolder(tmp_path).close()
        assert path.is_dir()
        owner.send_signal(signal.SIGKILL)
    assert path.is_dir(), "a killed process cannot clean up"
    SharedFolder(tmp_path).close()
    assert not path.exists()


def test_an_owner_that_exits_leaves_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", OWNER, str(tmp_path)], input="", text=True, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_remove_its_parents_folder(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from dashinfer_vlm.shared_array import SharedFolder\n"
        "folder = SharedFolder(pathlib.Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(0)\n"
        "os.waitpid(child, 0); assert folder.path.is_dir()"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_full_memory_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            put(tmp_path, np.zeros(8192, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
