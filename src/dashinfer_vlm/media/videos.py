"""Videos: a file of one, a list of its frames, or an array of them, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.images import Images, check_pixels, decode, open_image, upright_size
from dashinfer_vlm.media.medium import Limits, MediaLimits, Medium
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import (
    Pixels,
    Processed,
    ProcessorConfig,
    check_num_patches,
    num_tokens,
    process_frames,
    video_grid,
)
from dashinfer_vlm.request import Grid, ItemKind

_IMAGES = Images()


class Videos(Medium):
    """Some frames of a video are one grid of patches, laid out like an image's, a temporal step after the other."""

    kind: ClassVar[ItemKind] = "video"

    def limits(self, config: MediaConfig, limits: MediaLimits) -> Limits:
        return Limits(
            max_bytes=limits.max_video_bytes,
            fetch_timeout_s=limits.video_fetch_timeout_s,
            decode_timeout_s=limits.video_decode_timeout_s,
        )

    def part_limits(self, config: MediaConfig, limits: MediaLimits) -> Limits:
        return _IMAGES.limits(config, limits)

    def check_parts(self, num_parts: int, config: ProcessorConfig) -> None:
        most = config.video.max_frames
        if not 1 <= num_parts <= most:
            raise MediaTooLargeError(f"a list of {num_parts} frames; a video has 1 to {most}")

    def decode(self, data: bytes, terms: Terms) -> Processed:
        from dashinfer_vlm.media.films import process_film  # PyAV takes as long to import as all the rest

        return process_film(data, terms)

    def decode_parts(self, parts: tuple[bytes, ...], terms: Terms) -> Processed:
        return _process(_frames(parts, terms), len(parts), terms)

    def check_array(self, array: np.ndarray, terms: Terms) -> None:
        check_pixels(array, self.kind, terms.config.video.max_frames, terms.max_pixels)
        check_work(array.shape[2], array.shape[1], len(array), terms)

    def process_array(self, array: np.ndarray, terms: Terms) -> Processed:
        return _process(iter(array), len(array), terms)

    def layout(self, grid: Grid, config: ProcessorConfig) -> tuple[tuple[int, ...], str]:
        return _IMAGES.layout(grid, config)

    def num_tokens(self, grid: Grid, config: ProcessorConfig) -> int:
        return num_tokens(grid, config.merge_size)


def check_work(width: int, height: int, num_frames: int, terms: Terms) -> None:
    """Raise MediaTooLargeError for a video that is more than the encoder has memory for."""
    grid = video_grid(width, height, num_frames, terms.config)
    check_num_patches(grid, terms.max_patches, terms.config, "video")


def _process(frames: Iterator[Pixels], num_frames: int, terms: Terms) -> Processed:
    """Frames that were taken at the request's rate, or at the checkpoint's without one."""
    config = terms.config
    step_s = config.temporal_patch_size / (terms.sampling.fps or config.video.fps)
    return process_frames(frames, config, num_frames=num_frames, seconds_per_grid=step_s)


def _frames(parts: Sequence[bytes], terms: Terms) -> Iterator[Pixels]:
    for number, part in enumerate(parts):
        try:
            image = open_image(part, terms.max_pixels)
            check_work(*upright_size(image), len(parts), terms)
            yield decode(image)
        except MediaError as error:
            raise type(error)(f"frame {number}: {error}") from error
