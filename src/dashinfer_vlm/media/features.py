"""Features as the room keeps them: in shared memory, with what is known of them and how they were made."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from dataclasses import dataclass

import numpy as np

from dashinfer_vlm.media.wire import NO_ROOM, Decoded
from dashinfer_vlm.media.workers import SharedMemoryFullError
from dashinfer_vlm.request import Grid
from dashinfer_vlm.shared_array import SharedArray, SharedFolder
from dashinfer_vlm.stages import Span

__all__ = ["Features", "cache_bytes", "decode_spans", "put_features", "salted"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Features:
    grid: Grid
    content_hash: bytes
    seconds_per_grid: float
    timestamps: tuple[float, ...]
    array: SharedArray
    spans: tuple[Span, ...] = ()
    """How they were made."""


def decode_spans(decoded: Decoded, start_s: float, end_s: float) -> tuple[Span, ...]:
    """The process says how long it took, which is believed as far as it can be; before that it was waited for."""
    decoded_s = end_s - min(max(0.0, decoded.preprocess_s), end_s - start_s)
    began_s = decoded_s - min(max(0.0, decoded.decode_s), decoded_s - start_s)
    return (
        Span("decode_wait", start_s, began_s),
        Span("decode", began_s, decoded_s),
        Span("preprocess", decoded_s, end_s),
    )


def salted(content_hash: bytes, salt: str) -> bytes:
    """32 bytes."""
    return hashlib.sha256(salt.encode() + b"\0" + content_hash).digest() if salt else content_hash


def put_features(folder: SharedFolder, features: np.ndarray) -> SharedArray:
    try:
        return folder.put(features)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SharedMemoryFullError(NO_ROOM) from error


def cache_bytes(wanted: int, folder: SharedFolder) -> int:
    """No more than half of the memory folder: the rest is for items of running requests, and for other users of it."""
    allowed = min(wanted, shutil.disk_usage(folder.path).total // 2)
    if allowed < wanted:
        log.warning(
            "the cache of decoded media holds %d MiB instead of %d: half of what the memory folder %s has; give it "
            "more room (docker: --shm-size)",
            allowed >> 20,
            wanted >> 20,
            folder.path.parent,
        )
    return allowed
