"""What a decoding process answers, asked here in this process."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm.media.decode import answer, content_hash
from dashinfer_vlm.media.wire import Decoded, DecodeJob, Failed, Terms
from dashinfer_vlm.processors.qwen import Processed, ProcessorConfig


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def job(data: bytes, folder: Path) -> DecodeJob:
    return DecodeJob(
        kind="image",
        sources=(data,),
        terms=Terms(config=ProcessorConfig(), max_pixels=1_000_000, max_video_s=60.0),
        folder=str(folder),
        name="features",
    )


def test_features_lie_where_the_job_said(tmp_path: Path) -> None:
    reply = answer(job(png(100, 50), tmp_path))
    assert isinstance(reply, Decoded)
    assert (tmp_path / "features").stat().st_size == math.prod(reply.grid) * ProcessorConfig().patch_dim
    assert len(reply.content_hash) == 32


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"nothing", "media", "not an image"),
        (png(1, 10_000), "media", "1x10000 pixels; the longer side may be at most 200 times"),
        (png(1, 10_000)[:60], "media", "200 times"),
        (png(64, 64)[:-60], "media", "truncated or damaged"),
        (png(1001, 1000), "too_large", "1001x1000 pixels; the limit is 1 million"),
    ],
)
def test_a_bad_picture_is_explained_and_leaves_no_file(tmp_path: Path, data: bytes, kind: str, message: str) -> None:
    reply = answer(job(data, tmp_path))
    assert isinstance(reply, Failed)
    assert reply.kind == kind
    assert message in reply.message
    assert list(tmp_path.iterdir()) == []


def test_everything_that_decides_the_embedding_is_part_of_the_identity() -> None:
    config = ProcessorConfig()
    patches = np.zeros((16, config.patch_dim), np.uint8)
    processed = Processed(features=patches, grid=(1, 4, 4))
    others = [
        (dataclasses.replace(processed, grid=(1, 2, 8)), config),
        (dataclasses.replace(processed, grid=(4, 2, 2)), config),
        (dataclasses.replace(processed, seconds_per_grid=0.5), config),
        (dataclasses.replace(processed, features=patches + 1), config),
        (processed, dataclasses.replace(config, image_mean=(0.0, 0.0, 0.0))),
        (processed, dataclasses.replace(config, merge_size=4)),
    ]
    hashes = {content_hash(*other) for other in others}
    assert len(hashes) == len(others)
    assert content_hash(processed, config) not in hashes
    assert content_hash(processed, dataclasses.replace(config, max_pixels=99_999)) == content_hash(processed, config)
