"""Encoded pictures to RGB, with the header judged before a single pixel is decoded. Runs in decoding processes."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.png import without_descriptions
from dashinfer_vlm.processors.qwen import Pixels

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
    """Read the header only. Raises MediaError for an unknown format, MediaTooLargeError for too many pixels."""
    with explained():
        image = Image.open(io.BytesIO(without_descriptions(data)), formats=FORMATS)
    if math.prod(image.size) > max_pixels:
        raise MediaTooLargeError(
            f"the image has {image.width}x{image.height} pixels; the limit is {max_pixels / 1e6:g} million"
        )
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) without one, also where the EXIF block is damaged beside good pixels."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return 1
    return value if value in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as the picture will be seen, from the header. Pillow has turned a TIFF's size already."""
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
    255, which turns such pictures white.
    """
    if image.mode.startswith("I;16"):
        upper = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
