"""What the media room asks its decoding processes, and what they answer: msgspec over a pipe, never pickle."""

from __future__ import annotations

from typing import Literal

import msgspec

from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.processors.videos import Sampling

LENGTH_BYTES = 8
"""Every message is preceded by its length, big endian."""

JobKind = Literal["image", "video", "frames"]
"""`frames`: the sources are the images of one video."""

FailureKind = Literal["media", "too_large", "overloaded"]


class DecodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """One medium to decode, resize and cut into patches, which go to the file `name` of the shared `folder`."""

    kind: JobKind
    sources: tuple[bytes, ...]
    config: ProcessorConfig
    folder: str
    name: str
    max_pixels: int
    """Of one picture or frame, by its header."""
    max_video_s: float
    sampling: Sampling = Sampling()
    max_patches: int | None = None
    """Of the whole medium; None is no limit."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process is up and waits for jobs."""


class Decoded(msgspec.Struct, frozen=True, kw_only=True, tag="decoded"):
    """The patches lie in the file that the job named, as uint8 [rows x columns x frames of the grid, patch_dim]."""

    grid: tuple[int, int, int]
    content_hash: bytes
    seconds_per_grid: float
    timestamps: tuple[float, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job cannot be done; `message` is fit for the client's eyes."""

    kind: FailureKind
    message: str


Reply = Ready | Decoded | Failed
