"""Real pictures, a real HTTP server on loopback, and a loader that may fetch from it."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.media.site import LoaderMaker, PictureMaker, Site

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.media.loader import MediaLoader
from dashinfer_vlm.processors.qwen import ProcessorConfig


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    await site.start()
    yield site
    await site.stop()


@pytest.fixture
def picture() -> PictureMaker:
    """`picture(width, height, mode, format, seed, **save options)` gives an encoded image."""

    def make(
        width: int = 64, height: int = 48, mode: str = "RGB", format: str = "PNG", seed: int = 0, **options: Any
    ) -> bytes:
        rng = np.random.default_rng(seed)
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.convert(mode).save(buffer, format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
async def make_loader(site: Site) -> AsyncIterator[LoaderMaker]:
    """`make_loader(processor=..., limits=..., **media config)`; by default it may fetch from the site only."""
    loaders: list[MediaLoader] = []

    def make(
        processor: ProcessorConfig | None = None, limits: Any = None, resolve: Any = None, **config: Any
    ) -> MediaLoader:
        config.setdefault("allowed_media_domains", (f"127.0.0.1:{site.port}",))
        config.setdefault("image_fetch_timeout_s", 20.0)
        more = {"limits": limits} if limits is not None else {}
        loaders.append(MediaLoader(MediaConfig(**config), processor or ProcessorConfig(), resolve=resolve, **more))
        return loaders[-1]

    yield make
    for loader in loaders:
        await loader.close()
