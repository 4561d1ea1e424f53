"""Prompts for Qwen3-VL with images and videos, as the family writes them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.family import Run
from dashinfer_vlm.processors.qwen import ProcessorConfig, process_frames, process_image
from dashinfer_vlm.processors.videos import Qwen3Video, grid_timestamps
from dashinfer_vlm.request import Grid, Item, ItemKind
from tests.models.driving import Prompt
from tests.tokens import IMAGE, VIDEO, VISION_END, VISION_START

PROCESSOR = ProcessorConfig(
    patch_size=16,
    min_pixels=32 * 32,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    video=Qwen3Video(min_pixels=32 * 32),
)


@dataclass(frozen=True)
class Loaded:
    """What the media room knows of an item."""

    kind: ItemKind
    features: np.ndarray
    grid: Grid
    timestamps: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.features) // 4


def image(width: int, height: int, seed: int = 0) -> Loaded:
    """Noise; both sides are multiples of 32."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    done = process_image(pixels, PROCESSOR)
    return Loaded("image", done.features, done.grid)


def video(width: int, height: int, num_frames: int, fps: float = 2.0, seed: int = 0) -> Loaded:
    """Noise, a frame every 1 / `fps` seconds."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    done = process_frames(pixels, PROCESSOR, num_frames=num_frames, seconds_per_grid=1.0)
    return Loaded("video", done.features, done.grid, grid_timestamps([i / fps for i in range(num_frames)], 2))


def encode_text(text: str) -> list[int]:
    """Any tokenizer would do."""
    return [ord(c) for c in text]


def prompt(folder: Path, *parts: int | Loaded, seed: int = 0) -> Prompt:
    """Numbers stand for so many random text tokens; items are written as the family writes them."""
    config, draw = read_config(folder), random.Random(seed)
    ids: list[int] = []
    items: list[Item] = []
    for part in parts:
        if isinstance(part, int):
            ids += [draw.randrange(1000) for _ in range(part)]
            continue
        expansion = config.family.expand(config, part, encode_text)
        pieces = [*encode_text(expansion.lead), *expansion.pieces]
        for piece in pieces if part.kind == "video" else (VISION_START, *pieces, VISION_END):
            if isinstance(piece, Run):
                items.append(_item(part, piece, len(ids)))
                ids += [IMAGE if part.kind == "image" else VIDEO] * piece.num_tokens
            else:
                ids.append(piece)
    return Prompt(ids, tuple(items), PROCESSOR)


def _item(part: Loaded, run: Run, start: int) -> Item:
    return Item(
        kind=part.kind,
        start=start,
        num_tokens=run.num_tokens,
        content_hash=hashlib.sha256(part.features.tobytes()).digest(),
        grid=part.grid,
        patches=part.features,
        first_row=run.first_row,
        encoded_rows=part.num_tokens,
    )


CASES: dict[str, tuple[int | Loaded, ...]] = {
    "text only": (40,),
    "one image": (11, image(192, 128), 9),
    "image first and last": (image(64, 64), 5, image(96, 128, 1)),
    "three images interleaved": (7, image(128, 96), 3, image(32, 224, 1), 4, image(160, 160, 2), 6),
    "a video": (6, video(96, 64, 6), 8),
    "frames, one too few for the last pair": (3, video(64, 96, 5, fps=3.0), 4),
    "one frame": (3, video(64, 64, 1), 4),
    "videos and images mixed": (2, video(64, 64, 4), 3, image(96, 64), video(32, 96, 3, 1.0, 1), 5, image(64, 64, 3)),
}
