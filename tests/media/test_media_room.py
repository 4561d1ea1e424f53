"""A memory folder as small as a container's: the cache takes part of it and gives way."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.media.site import LoaderMaker, PictureMaker

from dashinfer_vlm import shared_array
from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.media.types import LoadedMedia, MediaRef
from dashinfer_vlm.processors.qwen import ProcessorConfig

Usage = namedtuple("Usage", "total used free")
CONFIG = ProcessorConfig(max_pixels=448 * 448)
ONE = 448 * 448 * 3 * 2
"""Bytes of a picture's features: each patch is repeated to fill a temporal step."""


@pytest.fixture
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system in memory with room for five pictures and a half, where the machine lets us make one."""
    size = f"size={ONE * 11 // 2 >> 10}k"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system in memory can be mounted here: {made.stderr.strip()}")
    monkeypatch.setattr(shared_array, "shared_root", lambda: tmp_path)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def load(loader: object, picture: PictureMaker, seed: int) -> LoadedMedia:
    ref = MediaRef(kind="image", source=picture(448, 448, seed=seed))
    return await loader.load(ref)  # type: ignore[attr-defined, no-any-return]


async def test_new_pictures_are_taken_for_ever(
    small_folder: Path, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader(CONFIG)
    for seed in range(22):
        (await load(loader, picture, seed)).release()
    assert ONE <= loader.counters.cache_bytes <= ONE * 11 // 4, "half of the folder at most"


async def test_what_is_cached_gives_way_to_what_is_needed(
    small_folder: Path, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader(CONFIG)
    for seed in range(2):
        (await load(loader, picture, seed)).release()
    assert loader.counters.cache_bytes == 2 * ONE
    held = [await load(loader, picture, seed) for seed in range(10, 15)]
    assert loader.counters.cache_bytes == 5 * ONE
    with pytest.raises(OverloadedError, match=r"no room in shared memory .* \(docker: --shm-size\)"):
        await load(loader, picture, 20)
    with pytest.raises(OverloadedError, match="no room in shared memory"):
        await loader.load(MediaRef(kind="image", source=np.zeros((1, 448, 448, 3), np.uint8)))
    held.pop().release()
    (await loader.load(MediaRef(kind="image", source=np.zeros((1, 448, 448, 3), np.uint8)))).release()
    for media in held:
        media.release()


def test_a_smaller_cache_than_was_asked_for_is_told(
    make_loader: LoaderMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    with caplog.at_level(logging.WARNING):
        make_loader()
    assert "holds 32 MiB instead of 256" in caplog.text
    assert "--shm-size" in caplog.text
