"""Who loads media for a model: the media room, or nobody for a text model."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from dashinfer_vlm.config import EngineConfig, MediaConfig
from dashinfer_vlm.errors import ConfigError, InvalidRequestError
from dashinfer_vlm.frontend.prompt import Loader
from dashinfer_vlm.media.loader import MediaCounters, MediaLoader
from dashinfer_vlm.media.types import LoadedMedia, MediaRef
from dashinfer_vlm.models.config import read_config

__all__ = ["NoLoader", "open_loader"]


def open_loader(folder: Path, engine: EngineConfig, media: MediaConfig) -> Loader:
    """The loader of media for the model in `folder`, which is yet to be started.

    Raises CheckpointError for a folder, ConfigError for a setting that cannot be used.
    """
    config = read_config(folder)
    if config.processor is not None:
        return MediaLoader(media, config.processor.with_server_bounds(engine.min_pixels, engine.max_pixels))
    if engine.min_pixels is not None or engine.max_pixels is not None:
        raise ConfigError(f"--min-pixels and --max-pixels mean nothing to {config.architecture}, a text model")
    return NoLoader()


class NoLoader:
    """A loader for a model that takes no media: messages with any are refused before it is asked."""

    def __init__(self) -> None:
        self.max_patches: int | None = None
        self.pixel_bounds = (1, 2**31 - 1)
        self.side_step = 1
        self.counters = MediaCounters()

    async def start(self) -> None:
        """There is nothing to start."""

    async def load(self, ref: MediaRef, party: Hashable = None, *, salt: str = "") -> LoadedMedia:
        raise InvalidRequestError(f"the model takes no {ref.kind} input", param=ref.param)

    async def close(self) -> None:
        """There is nothing to close."""
