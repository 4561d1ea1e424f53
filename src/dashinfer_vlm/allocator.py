"""What glibc does with memory that is given back to it. Elsewhere than on glibc these functions do nothing.

Source: mallopt(3).
"""

from __future__ import annotations

import ctypes

__all__ = ["RETURNED_BYTES", "keep_freed_memory", "return_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 256 * 2**20
"""Freed memory that stays with the process."""
_MAPPED_ALONE_BYTES = 32 * 2**20
"""Allocations from this size on are mapped each for itself; glibc takes no higher value."""
RETURNED_BYTES = 1 << 20
"""From here on buffers go back to the system at once."""


def keep_freed_memory() -> None:
    """For steps whose activations come and go by the megabyte: by default every large temporary is mapped, zeroed page
    by page and unmapped again."""
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    _set(_M_MMAP_THRESHOLD, _MAPPED_ALONE_BYTES)


def return_freed_memory() -> None:
    """For bodies and pictures of any size. By itself glibc raises the bound from which buffers are mapped with each
    that it frees, keeps them then between small things that live on, and gives threads heaps of their own, each with
    holes (`make soak`).
    """
    _set(_M_TRIM_THRESHOLD, RETURNED_BYTES)
    _set(_M_MMAP_THRESHOLD, RETURNED_BYTES)
    _set(_M_ARENA_MAX, 1)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
