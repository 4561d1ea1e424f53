"""The folder: which file belongs to which weights, how much may lie there, and who goes first.

Files appear at once and whole, so any number of processes may read and write; of two that write the same, the later one
stays. Nothing here stops a start: what cannot be read or written costs a line in the log, and the time to quantise.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dashinfer_vlm.kernels.cpu_ops import PackedWeight
from dashinfer_vlm.quant_cache.entry import Entry, UnusableError, write_entry

__all__ = ["QuantFolder"]

logger = logging.getLogger(__name__)

_GIB = 2**30
RESERVE_BYTES = 1 << 30
"""What is left free on the disk."""
UNFINISHED_S = 3600.0
"""Age at which a file that nobody finished is nobody's any more: its process was killed."""
RACY_NS = 2 * 10**9
"""A file that changed so recently may change again without getting another time stamp."""
MAX_SEEN = 256
"""Checkpoints whose identity is remembered."""


@dataclass(frozen=True, slots=True)
class QuantFolder:
    path: Path
    limit_bytes: int

    def open(self, name: str, identity: str) -> Entry | None:
        """The file `name` when it holds what `identity` says, marked as used now; else None."""
        path = self.path / name
        try:
            entry = Entry.open(path, identity)
        except FileNotFoundError:
            return None
        except (UnusableError, OSError) as error:
            logger.warning("quantised weights in %s cannot be used: %s; quantising again", path, error)
            return None
        with suppress(OSError):  # a folder that may only be read is of use, too; then age is no matter
            os.utime(path)
        return entry

    def write(self, name: str, identity: str, weights: Mapping[str, PackedWeight]) -> bool:
        """Keep `weights` as `name`, after removing what was used least recently until there is room; says whether it
        is kept."""
        num_bytes = sum(weight.num_bytes for weight in weights.values())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / name).unlink(missing_ok=True)
            self._make_room(num_bytes)
            refused = self._refusal(num_bytes)
            if refused is None:
                self._put(name, lambda path: write_entry(path, identity, weights))
        except OSError as error:
            refused = str(error)
        if refused is not None:
            logger.warning("quantised weights are not kept: %s", refused)
            return False
        logger.info("kept %.2f GiB of quantised weights in %s", num_bytes / _GIB, self.path / name)
        return True

    def remembered(self, files: Sequence[Path], part: str, identify: Callable[[], bytes]) -> bytes:
        """`identify()` of what `files` contain: reading gigabytes takes seconds, so the answer is kept for as long as
        no file changes its place, size or times."""
        started = time.time_ns()
        stats = [(str(path.resolve()), path.stat()) for path in files]
        seen = [(p, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats]
        path = self.path / f"{hashlib.sha256(repr((part, seen)).encode()).hexdigest()}.seen"
        with suppress(OSError, ValueError):
            digest = bytes.fromhex(path.read_text(encoding="ascii"))
            if len(digest) == hashlib.sha256().digest_size:
                return digest
        identity = identify()
        if max(max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats) < started - RACY_NS:
            with suppress(OSError):  # `write` will say why nothing can be kept here
                self.path.mkdir(parents=True, exist_ok=True)
                self._put(path.name, lambda new: new.write_text(identity.hex(), encoding="ascii"))
        return identity

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        unfinished = self.path / f"{name}.{secrets.token_hex(4)}.unfinished"
        try:
            write(unfinished)
            unfinished.replace(self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        for path, stat in _by_age(self.path.glob("*.unfinished")):
            if stat.st_mtime < time.time() - UNFINISHED_S:
                path.unlink(missing_ok=True)
        for path, _ in _by_age(self.path.glob("*.seen"))[:-MAX_SEEN]:
            path.unlink(missing_ok=True)
        entries = _by_age(self.path.glob("*.safetensors"))
        total = sum(stat.st_size for _, stat in entries)
        if num_bytes > self.limit_bytes:
            return  # it would not fit into an empty folder
        for path, stat in entries:
            if total + num_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
            logger.info("removed %s, which was used least recently, to make room", path)

    def _refusal(self, num_bytes: int) -> str | None:
        if num_bytes > self.limit_bytes:
            return (
                f"they take {num_bytes / _GIB:.2f} GiB, and --quant-cache-gib allows {self.limit_bytes / _GIB:g}; "
                "allow more, or 0 to stop trying"
            )
        free = shutil.disk_usage(self.path).free
        if free < num_bytes + RESERVE_BYTES:
            return f"they take {num_bytes / _GIB:.2f} GiB, and {self.path} has {free / _GIB:.2f} GiB free"
        return None


def _by_age(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """The least recently used first; files that another process removes meanwhile are left out."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return sorted(found, key=lambda item: item[1].st_mtime_ns)
