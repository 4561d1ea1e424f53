"""Qwen's image and video processors as plain arithmetic: settings, patches, grid, token count. No model, no network.

Patches stay uint8: rescaling and normalisation are folded into the model's patch embedding (`image_mean`, `image_std`).
The grid and the token count follow from width and height alone, so they are known before anything is decoded.
Source: Qwen2VLImageProcessor of `transformers`, which all Qwen-VL models use; `videos.py` has the rules for videos.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dashinfer_vlm.errors import CheckpointError, MediaError, MediaTooLargeError
from dashinfer_vlm.processors.sizes import check_shape, pixel_bounds, smart_resize
from dashinfer_vlm.processors.videos import Qwen2Video, VideoRule, grid_timestamps, read_rule
from dashinfer_vlm.request import Grid

Pixels = NDArray[np.uint8]

_MOST_PIXELS = 2**53
"""That a request may speak of, in all or along a side: whole numbers of JSON go no further."""
_RESIZED = ("resized_width", "resized_height")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    """The settings of a checkpoint's image and video processor; the defaults are those of the published classes."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    video: VideoRule = field(default_factory=Qwen2Video)
    """Which frames of a video are used, and how large they become."""
    resized: tuple[int, int] | None = None
    """(width, height) that a request wants instead of those of its image or video; rounded and bounded like them."""

    @property
    def factor(self) -> int:
        """Pixels along one side of a merged token; both sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Bytes of one patch: channels x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessorConfig:
        """`read`, then `min_pixels` and `max_pixels` replace the model's own for every item."""
        return cls.read(Path(folder)).with_server_bounds(min_pixels, max_pixels)

    @classmethod
    def read(cls, folder: Path) -> ProcessorConfig:
        """Read a model folder's settings.

        Understands `preprocessor_config.json`, `video_preprocessor_config.json` and the newer `processor_config.json`
        that nests both. Without settings for videos the image's hold, with at most 768 tokens per frame, which is the
        reference client's limit. Raises CheckpointError when the folder cannot be used.
        """
        both = _read_json(folder / "processor_config.json") or {}
        image = _read_json(folder / "preprocessor_config.json") or both.get("image_processor")
        if not isinstance(image, dict):
            raise CheckpointError(f"{folder} has no preprocessor_config.json; a vision-language model needs one")
        video = _read_json(folder / "video_preprocessor_config.json") or both.get("video_processor")
        return _parse(image, video if isinstance(video, dict) else None)

    def with_server_bounds(self, min_pixels: int | None, max_pixels: int | None) -> ProcessorConfig:
        """The same settings under the operator's bounds; a bound that only one side got moves the other along."""
        low = min_pixels if min_pixels is not None else min(self.min_pixels, max_pixels or self.min_pixels)
        high = max_pixels if max_pixels is not None else max(self.max_pixels, low)
        video = self.video.for_server(min_pixels, max_pixels)
        bounded = replace(self, min_pixels=low, max_pixels=high, video=video)
        bounded._check()
        return bounded

    def for_request(
        self,
        min_pixels: int | None,
        max_pixels: int | None,
        param: str | None = None,
        *,
        total_pixels: int | None = None,
        resized: tuple[int, int] | None = None,
    ) -> ProcessorConfig:
        """The same settings under one request's bounds, for its images and for the frames of its videos.

        `total_pixels` is the budget of a video's temporal patches together, as `qwen_vl_utils` counts it; the server's
        own holds where it is tighter. `resized` is a (width, height) to bring every image and frame to. Raises
        MediaError unless the bounds of pixels lie within the server's own.
        """
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and not self.min_pixels <= value <= self.max_pixels:
                raise MediaError(
                    f"{name} is {value}; this server takes {self.min_pixels} to {self.max_pixels}", param=param
                )
        low, high = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        if low > high:
            raise MediaError(f"min_pixels {low} is above max_pixels {high}", param=param)
        for name, value in (("total_pixels", total_pixels), *zip(_RESIZED, resized or (), strict=False)):
            if value is not None and not 1 <= value <= _MOST_PIXELS:
                raise MediaError(f"{name} is {value}; it must be from 1 to {_MOST_PIXELS}", param=param)
        if resized is not None:
            check_shape(*resized)
        video = self.video.for_request(min_pixels, max_pixels, total_pixels)
        return replace(self, min_pixels=low, max_pixels=high, video=video, resized=resized)

    def _check(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels"):
            _check_count(name, getattr(self, name))
        for name in ("min_frames", "max_frames", "min_pixels"):
            _check_count(name, getattr(self.video, name))
        if self.min_pixels > self.max_pixels:
            raise CheckpointError(
                f"the processor's min_pixels {self.min_pixels} are above its max_pixels {self.max_pixels}"
            )
        if not (math.isfinite(self.video.fps) and self.video.fps > 0):
            raise CheckpointError(f"the processor's fps is {self.video.fps}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processed:
    """Features of one item, and the grid that they lie on."""

    features: NDArray[Any]
    """Of images and videos: uint8 [P, patch_dim], patches in merge order."""
    grid: Grid
    seconds_per_grid: float = 1.0
    timestamps: tuple[float, ...] = ()
    """Seconds from the start of a video, one per temporal grid step; none for an image."""
    cost_s: float = 0.0
    """Seconds that resizing and cutting took."""


def image_size(width: int, height: int, config: ProcessorConfig) -> tuple[int, int]:
    """The (width, height) that an image of these sides is resized to."""
    width, height = config.resized or (width, height)
    return smart_resize(width, height, factor=config.factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)


def frame_size(width: int, height: int, num_frames: int, config: ProcessorConfig) -> tuple[int, int]:
    """The (width, height) that each of `num_frames` frames of a video is resized to."""
    width, height = config.resized or (width, height)
    return config.video.size(width, height, num_frames, factor=config.factor, step=config.temporal_patch_size)


def image_grid(width: int, height: int, config: ProcessorConfig) -> Grid:
    """The grid (frames, rows, columns, in patches) of an image, known from its header alone."""
    new_width, new_height = image_size(width, height, config)
    return 1, new_height // config.patch_size, new_width // config.patch_size


def video_grid(width: int, height: int, num_frames: int, config: ProcessorConfig) -> Grid:
    """The grid of a video of which `num_frames` frames are used."""
    new_width, new_height = frame_size(width, height, num_frames, config)
    pairs = -(-num_frames // config.temporal_patch_size)
    return pairs, new_height // config.patch_size, new_width // config.patch_size


def check_num_patches(grid: Grid, max_patches: int | None, config: ProcessorConfig, noun: str) -> None:
    """Raise MediaTooLargeError for more patches than the encoder has memory for; None means no limit."""
    frames, rows, columns = grid
    if max_patches is not None and math.prod(grid) > max_patches:
        times = f"{frames} times " if frames > 1 else ""
        raise MediaTooLargeError(
            f"the {noun} is encoded as {times}{columns * config.patch_size}x{rows * config.patch_size} pixels, "
            f"{math.prod(grid)} patches; there is memory for {max_patches}; send a smaller one, or a lower max_pixels"
        )


def num_tokens(grid: Grid, merge_size: int = 2) -> int:
    """Placeholder tokens of an item: one per merge_size x merge_size patches."""
    return math.prod(grid) // merge_size**2


def resize(image: Pixels, width: int, height: int, config: ProcessorConfig) -> Pixels:
    """uint8 [height, width, 3] from uint8 [H, W, 3]; clipped and rounded to whole values like the reference."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(config.resample)))


def patchify(frames: Pixels, config: ProcessorConfig) -> Pixels:
    """Cut uint8 [F, H, W, 3] into uint8 [P, patch_dim].

    A row holds its patch as channel, frame, row, column. Rows run over frame pairs, then over merged tokens, then over
    the merge_size x merge_size patches of each, so that the patches of a token are neighbours. The last frame is
    repeated when the frames do not fill a temporal patch; an image is one frame, repeated. H and W must be multiples
    of `config.factor`.
    """
    num_frames, height, width, _ = frames.shape
    patch, merge, pair = config.patch_size, config.merge_size, config.temporal_patch_size
    assert (height % config.factor, width % config.factor) == (0, 0), (height, width)
    padding = -num_frames % pair
    if num_frames > 1 and padding:
        frames = np.concatenate([frames, np.repeat(frames[-1:], padding, axis=0)])
    distinct = min(pair, len(frames))  # a lone image's frames are copied at the end, when they lie side by side
    rows, columns = height // config.factor, width // config.factor
    cut = frames.reshape(-1, distinct, rows, merge, patch, columns, merge, patch, 3)
    ordered: Pixels = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    if distinct < pair:
        ordered = np.broadcast_to(ordered, (*ordered.shape[:6], pair, patch, patch))
    return ordered.reshape(-1, config.patch_dim)


def process_image(image: Pixels, config: ProcessorConfig) -> Processed:
    """Resize and cut one RGB image, uint8 [H, W, 3]. Raises MediaError for an impossible shape."""
    start_s = time.perf_counter()
    width, height = image_size(image.shape[1], image.shape[0], config)
    grid = 1, height // config.patch_size, width // config.patch_size
    features = patchify(resize(image, width, height, config)[None], config)
    return Processed(features=features, grid=grid, cost_s=time.perf_counter() - start_s)


def process_frames(
    frames: Iterable[Pixels], config: ProcessorConfig, *, num_frames: int, seconds_per_grid: float
) -> Processed:
    """`process_timed_frames` for frames that follow each other evenly."""
    step_s = seconds_per_grid / config.temporal_patch_size
    timed = ((n * step_s, frame) for n, frame in enumerate(frames))
    return process_timed_frames(timed, config, num_frames=num_frames, seconds_per_grid=seconds_per_grid)


def process_timed_frames(
    frames: Iterable[tuple[float, Pixels]], config: ProcessorConfig, *, num_frames: int, seconds_per_grid: float
) -> Processed:
    """Resize and cut the chosen frames of a video, each its time in seconds and uint8 [H, W, 3] of one size.

    `frames` may be lazy, in any order, and yield fewer than the `num_frames` that were planned (a broken video); only
    resized frames are held. Raises MediaError when there is none, when sizes differ or the shape is impossible.
    """
    resized: list[Pixels] = []
    times: list[float] = []
    shape: tuple[int, ...] = ()
    width = height = 0
    cost_s = 0.0
    for frame_s, frame in frames:
        start_s = time.perf_counter()
        if not resized:
            shape = frame.shape
            width, height = frame_size(shape[1], shape[0], num_frames, config)
        elif frame.shape != shape:
            sizes = f"{shape[1]}x{shape[0]} and {frame.shape[1]}x{frame.shape[0]}"
            raise MediaError(f"the frames of a video must have one size; these have {sizes} pixels")
        resized.append(resize(frame, width, height, config))
        times.append(frame_s)
        cost_s += time.perf_counter() - start_s
    if not resized:
        raise MediaError("the video has no frame that can be used")
    start_s = time.perf_counter()
    order = sorted(range(len(times)), key=times.__getitem__)
    timestamps = grid_timestamps([times[n] for n in order], config.temporal_patch_size)
    features = patchify(np.stack([resized[n] for n in order]), config)
    return Processed(
        features=features,
        grid=(len(timestamps), height // config.patch_size, width // config.patch_size),
        seconds_per_grid=seconds_per_grid,
        timestamps=timestamps,
        cost_s=cost_s + time.perf_counter() - start_s,
    )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise CheckpointError(f"the processor's {name} is {value}; it must be at least 1")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _parse(image: Mapping[str, Any], video: Mapping[str, Any] | None) -> ProcessorConfig:
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if image.get(name, True) is False:
            raise CheckpointError(f"the processor config sets {name} to false, which is not supported")
    base = ProcessorConfig()
    min_pixels, max_pixels = pixel_bounds(image, base.min_pixels, base.max_pixels)
    try:
        config = ProcessorConfig(
            patch_size=int(image.get("patch_size", base.patch_size)),
            temporal_patch_size=int(image.get("temporal_patch_size", base.temporal_patch_size)),
            merge_size=int(image.get("merge_size", base.merge_size)),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            resample=Image.Resampling(int(image.get("resample", base.resample))),
            image_mean=_three(image.get("image_mean", base.image_mean)),
            image_std=_three(image.get("image_std", base.image_std)),
            rescale_factor=float(image.get("rescale_factor", base.rescale_factor)),
            video=read_rule(image, video),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the processor config has a value that cannot be used: {error}") from error
    config._check()
    return config


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
