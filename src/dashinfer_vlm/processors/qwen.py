"""Qwen2-VL's image processor as plain arithmetic: smart resize, patches, grid and token count. No model, no network.

Patches stay uint8: rescaling and normalisation are folded into the model's patch embedding (`image_mean`, `image_std`).
The grid and the token count follow from width and height alone, so they are known before anything is decoded.
Source: Qwen2VLImageProcessor and Qwen2VLVideoProcessor of `transformers`; Qwen2.5-VL uses the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dashinfer_vlm.errors import CheckpointError, MediaError, MediaTooLargeError

if TYPE_CHECKING:
    from dashinfer_vlm.request import Grid  # only the name: media workers start without torch

Pixels = NDArray[np.uint8]

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side at most; the reference implementation refuses more."""


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
    video_min_pixels: int = 128 * 28 * 28
    """Of one frame."""
    video_max_pixels: int = 768 * 28 * 28
    """Of one frame."""
    max_video_tokens: int = 115_200
    """Merged tokens that all frames of a video share: 90 % of the 128,000 that the reference assumes."""
    fps: float = 2.0
    """Frames sampled from one second of video when the request names no rate."""
    min_frames: int = 4
    max_frames: int = 768

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
        """Read a model folder's settings; `min_pixels` and `max_pixels` replace the model's own for every medium.

        Understands `preprocessor_config.json`, `video_preprocessor_config.json` and the newer `processor_config.json`
        that nests both. Without settings for videos the image's hold, with at most 768 tokens per frame, which is the
        reference client's limit. Raises CheckpointError when the folder cannot be used.
        """
        folder = Path(folder)
        both = _read_json(folder / "processor_config.json") or {}
        image = _read_json(folder / "preprocessor_config.json") or both.get("image_processor")
        if not isinstance(image, dict):
            raise CheckpointError(f"{folder} has no preprocessor_config.json; a vision-language model needs one")
        video = _read_json(folder / "video_preprocessor_config.json") or both.get("video_processor")
        config = _parse(image, video if isinstance(video, dict) else None)
        return config.with_server_bounds(min_pixels, max_pixels)

    def with_server_bounds(self, min_pixels: int | None, max_pixels: int | None) -> ProcessorConfig:
        """The same settings under the operator's bounds; a bound that only one side got moves the other along."""
        low = min_pixels if min_pixels is not None else min(self.min_pixels, max_pixels or self.min_pixels)
        high = max_pixels if max_pixels is not None else max(self.max_pixels, low)
        video_high = min(self.video_max_pixels, high)
        video_low = min(max(self.video_min_pixels, min_pixels or 0), video_high)
        bounded = replace(
            self, min_pixels=low, max_pixels=high, video_min_pixels=video_low, video_max_pixels=video_high
        )
        bounded._check()
        return bounded

    def for_request(self, min_pixels: int | None, max_pixels: int | None, param: str | None = None) -> ProcessorConfig:
        """The same settings under one request's bounds, for its images and for the frames of its videos.

        Raises MediaError unless they lie within the server's own bounds.
        """
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and not self.min_pixels <= value <= self.max_pixels:
                raise MediaError(
                    f"{name} is {value}; this server takes {self.min_pixels} to {self.max_pixels}", param=param
                )
        low, high = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        if low > high:
            raise MediaError(f"min_pixels {low} is above max_pixels {high}", param=param)
        video_high = max_pixels or max(self.video_max_pixels, min_pixels or 0)
        video_low = min_pixels or min(self.video_min_pixels, video_high)
        return replace(self, min_pixels=low, max_pixels=high, video_min_pixels=video_low, video_max_pixels=video_high)

    def _check(self) -> None:
        counts = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "min_frames", "max_frames")
        for name in counts:
            if getattr(self, name) < 1:
                raise CheckpointError(f"the processor's {name} is {getattr(self, name)}; it must be at least 1")
        if self.min_pixels > self.max_pixels:
            raise CheckpointError(
                f"the processor's min_pixels {self.min_pixels} are above its max_pixels {self.max_pixels}"
            )
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise CheckpointError(f"the processor's fps is {self.fps}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processed:
    """Patches of one medium: uint8 [P, patch_dim] in merge order, and the grid they were cut on."""

    patches: Pixels
    grid: Grid
    seconds_per_grid: float = 1.0


def smart_resize(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (width, height) to resize to: multiples of `factor`, the area within the bounds, the ratio about kept.

    A very long image can stay above `max_pixels`, since no side gets below `factor`. Raises MediaError for an aspect
    ratio above 200. Source: `smart_resize` of Qwen2VLImageProcessor.
    """
    if min(width, height) < 1:
        raise MediaError(f"the image is {width}x{height} pixels; both sides must be at least 1")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"the image is {width}x{height} pixels; the longer side may be at most {MAX_ASPECT_RATIO} times the shorter"
        )
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


def image_size(width: int, height: int, config: ProcessorConfig) -> tuple[int, int]:
    """The (width, height) that an image of these sides is resized to."""
    return smart_resize(width, height, factor=config.factor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)


def frame_size(width: int, height: int, num_frames: int, config: ProcessorConfig) -> tuple[int, int]:
    """The (width, height) that each of `num_frames` frames is resized to.

    All frames share `max_video_tokens`; each gets an even part, but never less than 1.05 times `video_min_pixels`.
    Source: `cap_pixels_per_frame` of Qwen2VLVideoProcessor, which is the rule of the reference client.
    """
    share = config.max_video_tokens * config.factor**2 * config.temporal_patch_size // num_frames
    max_pixels = max(min(config.video_max_pixels, share), int(config.video_min_pixels * 1.05))
    return smart_resize(width, height, factor=config.factor, min_pixels=config.video_min_pixels, max_pixels=max_pixels)


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
    """Raise MediaTooLargeError for more patches than the encoder has memory for; None is no limit."""
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


def sample_frames(total_frames: int, video_fps: float, config: ProcessorConfig, fps: float | None = None) -> list[int]:
    """Indices of the frames to use, evenly spread over a video of `total_frames` frames.

    About `fps` (else the config's) per second, between `min_frames` and `max_frames`, a multiple of the temporal patch
    size where the video has that many. Source: `sample_frames` of Qwen2VLVideoProcessor.
    """
    step = config.temporal_patch_size
    if total_frames < step:
        return list(range(total_frames))
    wanted = total_frames / video_fps * (fps or config.fps)
    most = min(config.max_frames, total_frames) // step * step
    count = max(step, math.floor(min(max(wanted, config.min_frames), most) / step) * step)
    return [i * total_frames // count for i in range(count)]


def seconds_per_grid(num_frames: int, total_frames: int, video_fps: float, config: ProcessorConfig) -> float:
    """Seconds of video behind one temporal grid step when `num_frames` of `total_frames` frames are used."""
    return config.temporal_patch_size * total_frames / (num_frames * video_fps)


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
    width, height = image_size(image.shape[1], image.shape[0], config)
    grid = 1, height // config.patch_size, width // config.patch_size
    return Processed(patches=patchify(resize(image, width, height, config)[None], config), grid=grid)


def process_frames(
    frames: Iterable[Pixels], config: ProcessorConfig, *, num_frames: int, seconds_per_grid: float
) -> Processed:
    """Resize and cut the chosen frames of a video, each uint8 [H, W, 3] of one size.

    `frames` may be lazy and yield fewer than the `num_frames` that were planned (a broken video); only resized frames
    are held. Raises MediaError when there is none, when sizes differ or the shape is impossible.
    """
    resized: list[Pixels] = []
    shape: tuple[int, ...] = ()
    width = height = 0
    for frame in frames:
        if not resized:
            shape = frame.shape
            width, height = frame_size(shape[1], shape[0], num_frames, config)
        elif frame.shape != shape:
            sizes = f"{shape[1]}x{shape[0]} and {frame.shape[1]}x{frame.shape[0]}"
            raise MediaError(f"the frames of a video must have one size; these have {sizes} pixels")
        resized.append(resize(frame, width, height, config))
    if not resized:
        raise MediaError("the video has no frame that can be used")
    pairs = -(-len(resized) // config.temporal_patch_size)
    grid = pairs, height // config.patch_size, width // config.patch_size
    return Processed(patches=patchify(np.stack(resized), config), grid=grid, seconds_per_grid=seconds_per_grid)


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
    min_pixels, max_pixels = _bounds(image, base.min_pixels, base.max_pixels)
    if video is None:
        video = image
        video_min, video_max = min_pixels, min(max_pixels, max(base.video_max_pixels, min_pixels))
    else:
        video_min, video_max = _bounds(video, base.video_min_pixels, base.video_max_pixels)
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
            video_min_pixels=video_min,
            video_max_pixels=video_max,
            fps=float(video.get("fps") or base.fps),
            min_frames=int(video.get("min_frames") or base.min_frames),
            max_frames=int(video.get("max_frames") or base.max_frames),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the processor config has a value that cannot be used: {error}") from error
    config._check()
    return config


def _bounds(settings: Mapping[str, Any], low: int, high: int) -> tuple[int, int]:
    """min and max pixels in either spelling; the older one wins where a file has both, as in the reference."""
    size = settings.get("size")
    size = size if isinstance(size, Mapping) else {}
    low = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or low
    high = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or high
    return int(low), int(high)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
