"""What the media room knows of a kind of item: the limits of its fetch, its decoder, its features, tokens and cost.

One subclass per kind, one file each, listed in `registry.py`; the loader and the decoding processes ask nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.errors import MediaTooLargeError
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import Processed, ProcessorConfig
from dashinfer_vlm.request import Grid, ItemKind


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Limits that have no flag of their own."""

    max_video_bytes: int = 256 << 20
    """Also of all frames of a list together."""
    max_video_s: float = 3600.0
    video_fetch_timeout_s: float = 30.0
    image_decode_timeout_s: float = 30.0
    video_decode_timeout_s: float = 120.0
    max_raw_bytes: int = 512 << 20
    """Encoded bytes held at once by all loads together, counted as they arrive."""
    wait_timeout_s: float = 30.0
    """Waiting for room among them, for a place to fetch, or for a decoding process, each."""
    max_fetches: int = 100
    """Fetches under way at once, of all requests together."""
    max_fetches_per_host: int = 32
    max_fetches_per_request: int = 16


DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one item."""

    max_bytes: int
    """Encoded."""
    fetch_timeout_s: float
    decode_timeout_s: float


class Medium(ABC):
    """One kind of item. Holds no state: all loaders and decoding processes share it."""

    kind: ClassVar[ItemKind]

    @abstractmethod
    def limits(self, config: MediaConfig, limits: MediaLimits) -> Limits:
        """What one item may weigh and take."""

    def part_limits(self, config: MediaConfig, limits: MediaLimits) -> Limits:
        """What one part of an item may weigh and take, where items may come in parts."""
        return self.limits(config, limits)

    def check_parts(self, num_parts: int, config: ProcessorConfig) -> None:
        """Raise MediaTooLargeError unless an item may be given as a list of this many parts."""
        raise MediaTooLargeError(f"a list of {num_parts} frames; only a video may be one, {self.kind}s come one by one")

    @abstractmethod
    def decode(self, data: bytes, terms: Terms) -> Processed:
        """Features of one encoded item. Runs in a decoding process; raises MediaError for what cannot be used."""

    def decode_parts(self, parts: tuple[bytes, ...], terms: Terms) -> Processed:
        """Features of an item that came as a list; its length has passed `check_parts`."""
        raise NotImplementedError(f"{self.kind}s have no parts")

    @abstractmethod
    def check_array(self, array: np.ndarray, terms: Terms) -> None:
        """Raise MediaError for a decoded item, from this process's own caller, that cannot be used."""

    @abstractmethod
    def process_array(self, array: np.ndarray, terms: Terms) -> Processed:
        """Features of a decoded item that has passed `check_array`."""

    @abstractmethod
    def layout(self, grid: Grid, config: ProcessorConfig) -> tuple[tuple[int, ...], str]:
        """Shape and numpy dtype of an item's features. One row is one unit of encoder work, the same for all kinds."""

    @abstractmethod
    def num_tokens(self, grid: Grid, config: ProcessorConfig) -> int:
        """Placeholder tokens of an item."""
