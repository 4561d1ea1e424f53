"""Smart resize: the sides that an image or a frame is brought to before it is cut into patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dashinfer_vlm.errors import MediaError

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side at most; the reference implementation refuses more."""


def smart_resize(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (width, height) to resize to: multiples of `factor`, the area within the bounds, the ratio about kept.

    A very long image can stay above `max_pixels`, since no side gets below `factor`. Raises MediaError for an aspect
    ratio above 200. Source: `smart_resize` of Qwen2VLImageProcessor.
    """
    return fit(width, height, factor, times=1, rounded_times=1, min_pixels=min_pixels, max_pixels=max_pixels)


def fit(
    width: int, height: int, factor: int, *, times: int, rounded_times: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """`smart_resize` for `times` frames of one size that share the bounds; `rounded_times` decides whether they
    keep them."""
    check_shape(width, height)
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    area = rounded_times * new_width * new_height
    if area > max_pixels:
        shrink = math.sqrt(times * width * height / max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (times * width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


def check_shape(width: int, height: int) -> None:
    """Raise MediaError for an empty side or an aspect ratio above `MAX_ASPECT_RATIO`."""
    if min(width, height) < 1:
        raise MediaError(f"the image is {width}x{height} pixels; both sides must be at least 1")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"the image is {width}x{height} pixels; the longer side may be at most {MAX_ASPECT_RATIO} times the shorter"
        )


def pixel_bounds(settings: Mapping[str, Any], low: int, high: int) -> tuple[int, int]:
    """Least and most pixels of a checkpoint's settings, in either spelling, or the defaults `low` and `high`.

    The older spelling wins where a file has both, as in the reference.
    """
    size = settings.get("size")
    size = size if isinstance(size, Mapping) else {}
    low = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or low
    high = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or high
    return int(low), int(high)
