"""Arrays that cross process borders by name: a file in memory (`/dev/shm`), a shape and a dtype; never pickle.

Owner: whoever called `SharedFolder.put`. The owner removes the file (`SharedArray.remove`) when nobody will open it
again; readers that have it open keep their mapping. A folder is removed by its owner's exit, and folders of dead
processes are swept when the next one is made, so a crash leaks nothing for long.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

_PREFIX = "dashinfer-"
_open: set[SharedFolder] = set()
_OWNED = re.compile(rf"{_PREFIX}\d+-[0-9a-f]+")
_PARENT = os.getppid()
_PARENT_EXIT_TIMEOUT_S = 1.0


class SharedArray(msgspec.Struct, frozen=True, array_like=True):
    """Name of an array in shared memory: small enough to travel in a message."""

    path: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    def open(self) -> NDArray[np.generic]:
        """Map the array read-only; raises FileNotFoundError once its owner has removed it."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=self.shape)

    def remove(self) -> None:
        """Unlink the file; idempotent, since owner and folder may both clean up."""
        Path(self.path).unlink(missing_ok=True)


class SharedFolder:
    """A private folder in memory for one owner process; its children may write into it by path.

    The owner holds a lock on the folder for as long as it lives. Process ids would not do: containers that share
    their memory folder do not share their process ids.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = root or shared_root()
        sweep(root)
        token = secrets.token_hex(8)
        unlocked = root / f"{_PREFIX}new-{token}"  # a name that `sweep` leaves alone until the lock is held
        unlocked.mkdir(mode=0o700)
        self._lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = unlocked.rename(root / f"{_PREFIX}{os.getpid()}-{token}")
        atexit.register(self.close, os.getpid())
        _open.add(self)

    def put(self, array: NDArray[np.generic], name: str | None = None) -> SharedArray:
        return put(self.path, array, name)

    def close(self, owner_pid: int | None = None) -> None:
        """Remove everything; idempotent. A forked child that runs the parent's exit hooks leaves it alone."""
        if owner_pid in (None, os.getpid()) and self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
            _open.discard(self)


def put(folder: Path, array: NDArray[np.generic], name: str | None = None) -> SharedArray:
    """Copy `array` into a new file of `folder` and name it.

    Empty arrays cannot be mapped and are refused. Raises OSError (ENOSPC) when the memory is not there: it is reserved
    first, since writing to a mapping that has none kills the process.
    """
    if array.size == 0:
        raise ValueError(f"cannot share an empty array of shape {array.shape}")
    path = folder / (name or secrets.token_hex(8))
    try:
        with path.open("xb") as file:
            _reserve(file.fileno(), array.nbytes)
        mapped = np.memmap(path, dtype=array.dtype, mode="r+", shape=array.shape)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    mapped[...] = array
    return SharedArray(str(path), tuple(array.shape), array.dtype.str)


def _reserve(file: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        hint = "give the memory folder more room (docker: --shm-size)"
        raise OSError(errno.ENOSPC, f"no room for {num_bytes} bytes of shared memory; {hint}") from error


def shared_root() -> Path:
    """`/dev/shm` where the system has it, else the folder for temporary files."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def leave() -> None:
    """Before an end without exit hooks, since the parent has died: remove what both have left.

    A process that is killed closes its files one after another, so its pipe may end before its locks do. It holds none
    once it is nobody's parent.
    """
    for folder in tuple(_open):
        folder.close()
    deadline = time.monotonic() + _PARENT_EXIT_TIMEOUT_S
    while os.getppid() == _PARENT and time.monotonic() < deadline:
        time.sleep(0.001)
    sweep(shared_root())


def sweep(root: Path) -> None:
    """Remove folders whose owner is gone: nobody holds their lock."""
    for folder in root.glob(f"{_PREFIX}*"):
        if _OWNED.fullmatch(folder.name) and _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # just removed by its owner, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
