"""Pictures that no server has seen: smooth shapes under grain, so that they weigh as much as photographs do."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["data_url", "draw"]

_SHAPE_PX = 32  # distance of the colours that the smooth part runs through
_GRAIN = 8.0  # standard deviation, of 255


def draw(size: tuple[int, int], key: Sequence[int]) -> Image.Image:
    """An RGB picture of `size` (width, height) in pixels; another `key` gives another picture."""
    width, height = size
    rng = np.random.default_rng(list(key))
    colours = rng.integers(0, 256, (height // _SHAPE_PX + 2, width // _SHAPE_PX + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.normal(0.0, _GRAIN, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def data_url(picture: Image.Image, kind: str) -> str:
    """`picture` as a data URL of `kind` "jpeg" (quality 90) or "png" (fast compression)."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 90} if kind == "jpeg" else {"compress_level": 1}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
