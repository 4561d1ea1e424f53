"""Who loads media for a model: the media room, or nobody for a text model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dashinfer_vlm.config import DeviceName, EngineConfig, MediaConfig
from dashinfer_vlm.cores import usable_cores
from dashinfer_vlm.errors import ConfigError, InvalidRequestError
from dashinfer_vlm.frontend.prompt import Loader
from dashinfer_vlm.media.loader import MediaLoader
from dashinfer_vlm.media.turns import ANYBODY, Party
from dashinfer_vlm.media.types import LoadedMedia, MediaCounters, MediaRef
from dashinfer_vlm.models.config import read_config

__all__ = ["NoLoader", "default_workers", "open_loader"]

_MOST_WORKERS = 8


def open_loader(folder: Path, engine: EngineConfig, media: MediaConfig) -> Loader:
    """The loader of media for the model in `folder`, which is yet to be started.

    Raises CheckpointError for a folder, ConfigError for a setting that cannot be used.
    """
    config = read_config(folder)
    if config.processor is not None:
        sized = replace(media, media_workers=media.media_workers or default_workers(engine.device))
        return MediaLoader(sized, config.processor.with_server_bounds(engine.min_pixels, engine.max_pixels))
    if engine.min_pixels is not None or engine.max_pixels is not None:
        raise ConfigError(f"--min-pixels and --max-pixels mean nothing to {config.architecture}, a text model")
    return NoLoader()


def default_workers(device: DeviceName, driver: Path = Path("/dev/nvidiactl")) -> int:
    """Decoding processes for an engine on `device`: one feeds a processor's encoder; a card's takes pictures faster
    than they are decoded, however many cores there are. `auto` has a card where there is the driver of one: torch,
    which knows for sure, is not asked in this process."""
    has_card = device == "cuda" or (device == "auto" and driver.exists())
    return max(1, min(_MOST_WORKERS, len(usable_cores()) // 2)) if has_card else 1


class NoLoader:
    """A loader for a model that takes no media: messages with any are refused before it is asked."""

    def __init__(self) -> None:
        self.max_patches: int | None = None
        self.pixel_bounds = (1, 2**31 - 1)
        self.side_step = 1
        self.counters = MediaCounters()

    async def start(self) -> None:
        """There is nothing to start."""

    async def load(self, ref: MediaRef, party: Party = ANYBODY, *, salt: str = "") -> LoadedMedia:
        raise InvalidRequestError(f"the model takes no {ref.kind} input", param=ref.param)

    async def close(self) -> None:
        """There is nothing to close."""
