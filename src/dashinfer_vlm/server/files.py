"""Files that are read again when they change: keys and certificates, which are replaced while the server runs."""

from __future__ import annotations

import os
import time

_LOOK_S = 1.0


class Changes:
    """Tells when files are others than they were. It looks once in a second at most, so that it may be asked at every
    request and every handshake."""

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self._seen = self._stamps()
        self._looked_s = time.monotonic()

    def happened(self) -> bool:
        """Whether a file has changed since the last time that this was True; a change is told once."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return False
        self._looked_s = now_s
        before, self._seen = self._seen, self._stamps()
        return self._seen != before

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
