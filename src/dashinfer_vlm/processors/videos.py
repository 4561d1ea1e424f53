"""Which frames of a video are used, when they stand in it, and how large they become: a rule per family of processors.

Source: Qwen2VLVideoProcessor and Qwen3VLVideoProcessor of `transformers`, and `qwen_vl_utils` for what a request may
ask for; `tests/processors/golden` holds what they answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from dashinfer_vlm.errors import MediaError
from dashinfer_vlm.processors.sizes import check_shape, fit, pixel_bounds, smart_resize

LEAST_FPS = 1e-5
"""A frame in a day. Models count the seconds between frames of a list, and at lower rates would count beyond their
numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a request wants the frames of one video chosen; None leaves it to the checkpoint."""

    fps: float | None = None
    """Frames taken from one second."""
    num_frames: int | None = None
    """Frames to take, instead of a rate; Qwen2-VL rounds them to whole pairs, and a shorter video is used whole."""
    min_frames: int | None = None
    max_frames: int | None = None

    def check(self, most_frames: int, param: str | None = None) -> None:
        """Raise MediaError, naming the field, for what contradicts itself or exceeds `most_frames`."""
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps >= LEAST_FPS):
            raise MediaError(f"fps is {self.fps}; it must be {LEAST_FPS:g} or more", param=param)
        for name in ("num_frames", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most_frames:
                raise MediaError(f"{name} is {value}; this server takes 1 to {most_frames}", param=param)
        if self.fps is not None and self.num_frames is not None:
            raise MediaError("fps and num_frames exclude each other; send one of them", param=param)
        if self.min_frames is not None and self.max_frames is not None and self.min_frames > self.max_frames:
            raise MediaError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}", param=param)


class _Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What both families have."""

    fps: float = 2.0
    """Frames sampled from one second of video when the request names no rate."""
    min_frames: int = 4
    max_frames: int = 768

    def _wanted(self, total_frames: int, video_fps: float, sampling: Sampling) -> float:
        """Frames by rate, within the least and the most; not rounded yet."""
        wanted = total_frames / video_fps * (sampling.fps or self.fps)
        return min(max(wanted, sampling.min_frames or self.min_frames), sampling.max_frames or self.max_frames)


class Qwen2Video(_Rule, frozen=True, kw_only=True, tag="qwen2_vl"):
    """Qwen2-VL and Qwen2.5-VL: frames in whole temporal patches, bounds of one frame, a budget shared by all."""

    min_pixels: int = 128 * 28 * 28
    """Of one frame."""
    max_pixels: int = 768 * 28 * 28
    """Of one frame."""
    max_tokens: int = 115_200
    """Merged tokens that all frames share: 90 % of the 128,000 that the reference assumes."""
    total_pixels: int | None = None
    """A request's own budget: pixels of all temporal patches, each counted as one frame."""
    capped: bool = True
    """Whether the frames share a budget, as those of the reference client do."""

    def choose(self, total_frames: int, video_fps: float, sampling: Sampling, step: int) -> list[int]:
        """Ascending indices into `total_frames` frames: about `fps` per second, a multiple of the temporal patch size
        `step` where the video has that many. Source: `sample_frames` of Qwen2VLVideoProcessor."""
        if total_frames < step:
            return list(range(total_frames))
        most = min(sampling.max_frames or self.max_frames, total_frames) // step * step
        if sampling.num_frames is not None:
            wanted: float = round(sampling.num_frames / step) * step
        else:
            wanted = self._wanted(total_frames, video_fps, sampling)
        count = max(step, math.floor(min(wanted, most) / step) * step)
        return [i * total_frames // count for i in range(count)]

    def size(self, width: int, height: int, num_frames: int, *, factor: int, step: int) -> tuple[int, int]:
        """The (width, height) that each of `num_frames` frames is resized to.

        Each frame gets an even part of the budget, but never less than 1.05 times `min_pixels`. Source:
        `cap_pixels_per_frame` of Qwen2VLVideoProcessor, which is the rule of the reference client.
        """
        most = self.max_pixels
        if self.capped:
            total = self.max_tokens * factor**2
            share = min(total, self.total_pixels or total) * step // num_frames
            most = max(min(most, share), int(self.min_pixels * 1.05))
        return smart_resize(width, height, factor=factor, min_pixels=self.min_pixels, max_pixels=most)

    def for_server(self, min_pixels: int | None, max_pixels: int | None) -> Qwen2Video:
        """Under the operator's bounds of one frame."""
        high = max(self.max_pixels, min_pixels or 0) if max_pixels is None else min(self.max_pixels, max_pixels)
        low = min(max(self.min_pixels, min_pixels or 0), high)
        return msgspec.structs.replace(self, min_pixels=low, max_pixels=high)

    def for_request(self, min_pixels: int | None, max_pixels: int | None, total_pixels: int | None) -> Qwen2Video:
        """Under one request's bounds of one frame and its budget, where that is tighter than the server's."""
        high = max_pixels or max(self.max_pixels, min_pixels or 0)
        low = min_pixels or min(self.min_pixels, high)
        capped = self.capped or total_pixels is not None
        return msgspec.structs.replace(self, min_pixels=low, max_pixels=high, total_pixels=total_pixels, capped=capped)


class Qwen3Video(_Rule, frozen=True, kw_only=True, tag="qwen3_vl"):
    """Qwen3-VL: the first and the last frame always, and bounds of all frames together."""

    min_pixels: int = 4096
    """Of all frames together."""
    max_pixels: int = 25_165_824
    """Of all frames together."""
    frame_min_pixels: int | None = None
    """The operator's or a request's bound of one frame."""
    frame_max_pixels: int | None = None
    max_frame_tokens: int = 768
    """Merged tokens of one frame at most, where `capped`."""
    capped: bool = False
    """Whether a frame also has a bound of its own; the published settings say no."""

    def choose(self, total_frames: int, video_fps: float, sampling: Sampling, step: int) -> list[int]:
        """Ascending indices into `total_frames` frames, first and last included. Source: `sample_frames` of
        Qwen3VLVideoProcessor."""
        wanted = sampling.num_frames or self._wanted(total_frames, video_fps, sampling)
        count = min(int(wanted), total_frames)
        chosen: list[int] = np.linspace(0, total_frames - 1, count).round().astype(int).tolist()
        return chosen

    def size(self, width: int, height: int, num_frames: int, *, factor: int, step: int) -> tuple[int, int]:
        """The (width, height) that each of `num_frames` frames is resized to; a frame smaller than a token is enlarged
        first. Source: `smart_resize` of Qwen3VLVideoProcessor."""
        num_frames = max(num_frames, step)
        check_shape(width, height)
        if min(width, height) < factor:
            scale = max(factor / height, factor / width)
            width, height = int(width * scale), int(height * scale)
        low, high = self._bounds(num_frames, factor)
        times = round(num_frames / step) * step
        return fit(width, height, factor, times=num_frames, rounded_times=times, min_pixels=low, max_pixels=high)

    def _bounds(self, num_frames: int, factor: int) -> tuple[int, int]:
        high = self.max_pixels
        if self.capped:
            share = min(self.max_frame_tokens * factor**2, high // num_frames)
            high = max(share, int(self.min_pixels * 1.05)) * num_frames
        if self.frame_max_pixels is not None:
            high = min(high, self.frame_max_pixels * num_frames)
        return min(max(self.min_pixels, (self.frame_min_pixels or 0) * num_frames), high), high

    def for_server(self, min_pixels: int | None, max_pixels: int | None) -> Qwen3Video:
        """Under the operator's bounds of one frame."""
        return msgspec.structs.replace(self, frame_min_pixels=min_pixels, frame_max_pixels=max_pixels)

    def for_request(self, min_pixels: int | None, max_pixels: int | None, total_pixels: int | None) -> Qwen3Video:
        """Under one request's bounds of one frame and its budget, where that is tighter than the server's."""
        high = self.max_pixels if total_pixels is None else min(self.max_pixels, 2 * total_pixels)
        return msgspec.structs.replace(
            self,
            max_pixels=max(high, self.min_pixels),
            frame_min_pixels=min_pixels or self.frame_min_pixels,
            frame_max_pixels=max_pixels or self.frame_max_pixels,
        )


VideoRule = Qwen2Video | Qwen3Video


def read_rule(image: Mapping[str, Any], video: Mapping[str, Any] | None) -> VideoRule:
    """The rule of a checkpoint with these settings for images and, where it has them, for videos."""
    settings = (image, video or {})
    names = [s.get(key) for s in settings for key in ("processor_class", "video_processor_type")]
    if any(isinstance(name, str) and name.startswith("Qwen3VL") for name in names):
        return _read_qwen3(video or {})
    return _read_qwen2(image, video)


def _read_qwen2(image: Mapping[str, Any], video: Mapping[str, Any] | None) -> Qwen2Video:
    """Without settings for videos the image's hold, with at most 768 tokens per frame."""
    base = Qwen2Video()
    if video is None:
        low, high = pixel_bounds(image, 56 * 56, 28 * 28 * 1280)
        high = min(high, max(base.max_pixels, low))
    else:
        low, high = pixel_bounds(video, base.min_pixels, base.max_pixels)
    settings = image if video is None else video
    tokens = settings.get("max_video_tokens")
    return Qwen2Video(
        min_pixels=low,
        max_pixels=high,
        max_tokens=base.max_tokens if tokens is None else int(tokens * 0.9),
        capped=settings.get("cap_pixels_per_frame") is not False,
        **_read_rate(settings, base),
    )


def _read_qwen3(video: Mapping[str, Any]) -> Qwen3Video:
    base = Qwen3Video()
    low, high = pixel_bounds(video, base.min_pixels, base.max_pixels)
    return Qwen3Video(
        min_pixels=low,
        max_pixels=high,
        max_frame_tokens=int(video.get("max_video_tokens") or base.max_frame_tokens),
        capped=bool(video.get("cap_pixels_per_frame")),
        **_read_rate(video, base),
    )


def _read_rate(settings: Mapping[str, Any], base: VideoRule) -> dict[str, Any]:
    return {
        "fps": float(settings.get("fps") or base.fps),
        "min_frames": int(settings.get("min_frames") or base.min_frames),
        "max_frames": int(settings.get("max_frames") or base.max_frames),
    }


def seconds_per_grid(num_frames: int, total_frames: int, video_fps: float, step: int) -> float:
    """Seconds of video behind one temporal grid step of `step` frames when `num_frames` of `total_frames` are used."""
    return step * total_frames / (num_frames * video_fps)


def grid_timestamps(times: Sequence[float], step: int) -> tuple[float, ...]:
    """When each temporal grid step stands in the video, in seconds: midway between its first and its last frame.

    `times` are those of the frames that are used; the last one is repeated to whole steps of `step` frames. Source:
    `_calculate_timestamps` of Qwen3VLProcessor.
    """
    padded = [*times, *[times[-1]] * (-len(times) % step)]
    return tuple((padded[i] + padded[i + step - 1]) / 2 for i in range(0, len(padded), step))
