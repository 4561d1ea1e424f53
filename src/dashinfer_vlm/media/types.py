"""What a client may name as an item, and what comes of it: the border between the front end and the media room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dashinfer_vlm.request import Grid, ItemKind
from dashinfer_vlm.shared_array import SharedArray
from dashinfer_vlm.stages import Span


@dataclass(frozen=True, slots=True)
class GivenEmbedding:
    """An image that its sender has encoded already: both are safetensors files of one tensor, in base64."""

    image_embeds: str
    image_grid_thw: str


Source = str | bytes | np.ndarray | tuple[str | bytes, ...] | GivenEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRef:
    """One image or video as a client named it. `source` is a URL (http, https, data, file), the encoded bytes, or
    decoded frames as uint8 [F, H, W, 3] (an image has F = 1); a video may also be a tuple of images, an image an
    embedding."""

    kind: ItemKind
    source: Source
    min_pixels: int | None = None
    """Per-request bound; must lie within the server's own bounds."""
    max_pixels: int | None = None
    resized_height: int | None = None
    """With `resized_width`: sides to bring the image or the frames to, rounded and bounded like any other size."""
    resized_width: int | None = None
    total_pixels: int | None = None
    """Of a video's temporal patches together, as `qwen_vl_utils` counts them; the server's own where it is tighter."""
    fps: float | None = None
    """Frames per second to sample from a video; the processor's value when None. Of a list of frames and of an array,
    the rate at which they were taken."""
    num_frames: int | None = None
    """Frames to sample from a video, instead of `fps`; a shorter one is used whole."""
    min_frames: int | None = None
    max_frames: int | None = None
    param: str | None = None
    """Where in the request it stands ("messages[0].content[1]"), for error messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedMedia:
    """An item after fetching, decoding and processing: everything the prompt and the encoder need.

    `features` stay valid until `release` is called (once, by whoever awaited the load), after the engine's last word
    on the request.
    """

    kind: ItemKind
    grid: Grid
    num_tokens: int
    content_hash: bytes
    features: SharedArray
    """For the encoder; of a GivenEmbedding its rows, float32 [num_tokens, width]."""
    release: Callable[[], None]
    seconds_per_grid: float = 1.0
    """Seconds of video per temporal grid step, by the rate at which frames were sampled."""
    timestamps: tuple[float, ...] = ()
    """Seconds from the start of a video, one per temporal grid step (`grid[0]`): midway between the step's first and
    last frame, by the frames' own time stamps. Empty for an image."""
    is_embedding: bool = False
    """There is nothing left to encode."""
    spans: tuple[Span, ...] = ()
    """What the load has waited for; nothing of what was there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaCounters:
    """What the room has done since it was opened, but for `cache_bytes`, which is what it holds now."""

    fetches: int = 0
    """GETs of http and https URLs; redirects not counted."""
    fetched_bytes: int = 0
    decodes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes: int = 0
    refusals: int = 0
    failures: int = 0
    """Loads that ended in a MediaError, refusals included."""
    worker_restarts: int = 0
