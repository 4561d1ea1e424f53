"""How often a JPEG goes over its pixels, told by its markers: each scan costs as much time as the whole picture."""

from __future__ import annotations

import re

MAX_SCANS = 100
"""Encoders write 1 (baseline) to 15 (progressive); a file of a few kilobytes may hold thousands."""
_USUAL_SCANS = 16

_START, _SCAN, _END = 0xD8, 0xDA, 0xD9
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""A marker behind entropy-coded data: neither a stuffed byte nor a restart."""


def most_scans(num_pixels: int, max_pixels: int) -> int:
    """Scans that an image of `num_pixels` may have: what an encoder writes for the largest image costs no less."""
    return min(MAX_SCANS, _USUAL_SCANS * max_pixels // max(num_pixels, 1))


def num_scans(data: bytes, most: int = MAX_SCANS) -> int:
    """Scans of a JPEG, counted up to one more than `most`; 0 for what is no JPEG."""
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    scans, position = 0, 2
    while scans <= most and (found := _MARKER.search(data, position)):
        marker, position = found[1][0], found.end()
        scans += marker == _SCAN
        if marker == _END:
            break
        if marker not in (_START, 0x01):
            position += int.from_bytes(data[position : position + 2], "big")
    return scans
