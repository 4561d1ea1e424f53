"""What the media room asks its decoding processes, and what they answer: msgspec over a pipe, never pickle."""

from __future__ import annotations

from typing import Literal

import msgspec

from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.processors.videos import Sampling
from dashinfer_vlm.request import ItemKind

LENGTH_BYTES = 8
"""Every message is preceded by its length, big endian."""

NO_ROOM = "no room in shared memory for the decoded item; try again later, or give it more (docker: --shm-size)"

FailureKind = Literal["media", "too_large", "no_room"]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What an item is made into and what it may cost: the checkpoint's settings under the request's and the server's
    bounds."""

    config: ProcessorConfig
    sampling: Sampling = Sampling()
    max_pixels: int
    """Of one image or frame, by its header."""
    max_video_s: float
    max_patches: int | None = None
    """Encoder work of the whole item, in rows of its features; None means no limit."""
    salt: str = ""
    """Equal items with another salt share nothing that is kept."""


class DecodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """One item to decode and turn into features, which go to the file `name` of the shared `folder`."""

    kind: ItemKind
    sources: tuple[bytes, ...]
    """The whole item, or its parts in order (the frames of a video) where `in_parts`."""
    in_parts: bool = False
    terms: Terms
    folder: str
    name: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process is up and waits for jobs."""


class Decoded(msgspec.Struct, frozen=True, kw_only=True, tag="decoded"):
    """The features lie in the file that the job named, laid out as `Medium.layout` says."""

    grid: tuple[int, int, int]
    content_hash: bytes
    seconds_per_grid: float
    timestamps: tuple[float, ...]
    decode_s: float
    """Seconds from bytes to pixels; `preprocess_s` from pixels to features in their file. A process that was taken over
    may say anything."""
    preprocess_s: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job cannot be done; `message` is fit for the client's eyes."""

    kind: FailureKind
    message: str


Reply = Ready | Decoded | Failed
