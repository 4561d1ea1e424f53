"""Images: encoded ones to RGB, with the header judged before a single pixel is decoded, and what becomes of them."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.jpeg import most_scans, num_scans
from dashinfer_vlm.media.medium import Limits, MediaLimits, Medium
from dashinfer_vlm.media.png import without_descriptions
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import (
    Pixels,
    Processed,
    ProcessorConfig,
    check_num_patches,
    image_grid,
    num_tokens,
    process_image,
)
from dashinfer_vlm.request import Grid, ItemKind

Image.init()  # registers the decoders, once
FORMATS = tuple(name for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF") if name in Image.OPEN)
"""Pillow's names of what is decoded; its many other decoders are never reached by a client's bytes."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it (EXIF 2.3, section 4.6.4)."""

Image.MAX_IMAGE_PIXELS = None  # `open_image` has its own limit, which the operator can set


@contextmanager
def explained(noun: str = "image") -> Iterator[None]:
    """Whatever a decoder raises on broken bytes becomes a MediaError without its text, which may hold addresses."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"this is not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise nearly every type there is
        raise MediaError(f"the {noun} is truncated or damaged") from error


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only. Raises MediaError for an unknown format, MediaTooLargeError for too many pixels or
    scans."""
    with explained():
        image = Image.open(io.BytesIO(without_descriptions(data)), formats=FORMATS)
    if math.prod(image.size) > max_pixels:
        raise MediaTooLargeError(
            f"the image has {image.width}x{image.height} pixels; the limit is {max_pixels / 1e6:g} million; send a "
            "smaller one, or start with --max-image-mpx"
        )
    most = most_scans(math.prod(image.size), max_pixels)
    if num_scans(data, most) > most:
        raise MediaTooLargeError(f"the image has more than {most} scans; save it with fewer, or as a baseline JPEG")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) without one, also where the EXIF block is damaged beside good pixels."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return 1
    return value if value in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as the image will be seen, from the header. Pillow has turned a TIFF's size already."""
    return image.size[::-1] if orientation(image) >= 5 and image.format != "TIFF" else image.size


def decode(image: Image.Image) -> Pixels:
    """Decode an opened image: uint8 [H, W, 3], upright, transparency on white, the first frame of an animation.

    Raises MediaError for truncated or damaged data.
    """
    with explained():
        image.load()
        turn = _UPRIGHT.get(orientation(image))
        rgb = to_rgb(image)
        return np.asarray(rgb if turn is None else rgb.transpose(turn))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency is composited onto white, as the reference processor does.

    One deviation: 16-bit greyscale keeps its upper 8 bits, as 16-bit colour does. Pillow's own conversion clips it at
    255, which turns such images white.
    """
    if image.mode.startswith("I;16"):
        upper = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


class Images(Medium):
    """One image is one grid of patches; features are uint8 [patches, patch_dim], and a patch is a unit of work."""

    kind: ClassVar[ItemKind] = "image"

    def limits(self, config: MediaConfig, limits: MediaLimits) -> Limits:
        return Limits(
            max_bytes=config.max_image_mib << 20,
            fetch_timeout_s=config.image_fetch_timeout_s,
            decode_timeout_s=limits.image_decode_timeout_s,
        )

    def decode(self, data: bytes, terms: Terms) -> Processed:
        image = open_image(data, terms.max_pixels)
        self._check_work(*upright_size(image), terms)  # before it is decoded
        return process_image(decode(image), terms.config)

    def check_array(self, array: np.ndarray, terms: Terms) -> None:
        check_pixels(array, self.kind, 1, terms.max_pixels)
        self._check_work(array.shape[2], array.shape[1], terms)

    def process_array(self, array: np.ndarray, terms: Terms) -> Processed:
        return process_image(array[0], terms.config)

    def layout(self, grid: Grid, config: ProcessorConfig) -> tuple[tuple[int, ...], str]:
        return (math.prod(grid), config.patch_dim), "|u1"

    def num_tokens(self, grid: Grid, config: ProcessorConfig) -> int:
        return num_tokens(grid, config.merge_size)

    def _check_work(self, width: int, height: int, terms: Terms) -> None:
        check_num_patches(image_grid(width, height, terms.config), terms.max_patches, terms.config, self.kind)


def check_pixels(array: np.ndarray, kind: ItemKind, most_frames: int, max_pixels: int) -> None:
    """Raise MediaError unless `array` is uint8 [F, H, W, 3] with 1 to `most_frames` frames of `max_pixels` at most."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise MediaError(f"frames must be uint8 [F, H, W, 3], not {array.dtype} {list(array.shape)}")
    if not 1 <= len(array) <= most_frames:
        raise MediaTooLargeError(f"the array has {len(array)} frames; this {kind} may have 1 to {most_frames}")
    if math.prod(array.shape[1:3]) > max_pixels:
        sides = f"{array.shape[2]}x{array.shape[1]}"
        raise MediaTooLargeError(f"the {kind} has {sides} pixels; the limit is {max_pixels / 1e6:g} million")
