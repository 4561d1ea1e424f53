"""The processor against `transformers`: same grid always, pixels within one part in 255."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from dashinfer_vlm.errors import CheckpointError, MediaError
from dashinfer_vlm.processors.qwen import (
    Pixels,
    ProcessorConfig,
    frame_size,
    image_grid,
    num_tokens,
    patchify,
    process_frames,
    process_image,
    video_grid,
)
from dashinfer_vlm.processors.sizes import smart_resize
from dashinfer_vlm.processors.videos import Qwen2Video, Qwen3Video

CONFIG = ProcessorConfig(max_pixels=12845056)
MEAN = np.asarray(CONFIG.image_mean, np.float32)
STD = np.asarray(CONFIG.image_std, np.float32)


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    """Noise over a gradient, so that a wrong order of anything shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, height)[:, None, None] + np.linspace(0, 40, width)[None, :, None]
    return np.clip(ramp + rng.integers(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)


def normalise(patches: Pixels, config: ProcessorConfig = CONFIG) -> np.ndarray[Any, Any]:
    """What the model's patch embedding does to the bytes."""
    channels = patches.reshape(len(patches), 3, -1).astype(np.float32) / 255
    return np.asarray((channels - MEAN[:, None]) / STD[:, None]).reshape(len(patches), -1)


def reference(config: ProcessorConfig = CONFIG) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
    )


SIZES = [
    (1, 1), (1, 200), (200, 1), (27, 29), (28, 28), (42, 42), (56, 56), (57, 55), (100, 37), (224, 224), (223, 225),
    (448, 448), (640, 480), (333, 777), (1000, 5), (1280, 720), (2000, 10), (1919, 1081),
]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_patches_and_grid_equal_those_of_the_reference(width: int, height: int) -> None:
    image = picture(width, height)
    ours = process_image(image, CONFIG)
    theirs = reference()(Image.fromarray(image), return_tensors="np")
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist()
    assert ours.grid == image_grid(width, height, CONFIG)
    assert ours.features.dtype == np.uint8
    assert ours.features.shape == (math.prod(ours.grid), CONFIG.patch_dim)
    tolerance = 1 / 255 / float(STD.min())
    np.testing.assert_allclose(normalise(ours.features), theirs["pixel_values"], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("patch_size", "merge_size", "temporal_patch_size"), [(14, 2, 2), (16, 2, 2), (14, 1, 1), (8, 3, 2)]
)
def test_other_patch_and_merge_sizes_follow_the_reference_too(
    patch_size: int, merge_size: int, temporal_patch_size: int
) -> None:
    config = ProcessorConfig(patch_size=patch_size, merge_size=merge_size, temporal_patch_size=temporal_patch_size)
    image = picture(301, 190)
    ours = process_image(image, config)
    theirs = reference(config)(Image.fromarray(image), return_tensors="np")
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist()
    np.testing.assert_allclose(normalise(ours.features), theirs["pixel_values"], atol=1e-2, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(56 * 56, 28 * 28 * 4), (28 * 28 * 100, 28 * 28 * 120), (3136, 100_000)])
def test_pixel_bounds_follow_the_reference(low: int, high: int) -> None:
    config = ProcessorConfig(min_pixels=low, max_pixels=high)
    for width, height in ((50, 60), (640, 480), (30, 900)):
        theirs = reference(config)(Image.fromarray(picture(width, height)), return_tensors="np")
        assert [list(image_grid(width, height, config))] == theirs["image_grid_thw"].tolist()


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    factor=st.sampled_from([14, 28, 32]),
    low=st.integers(1, 10**6),
    extra=st.integers(0, 10**7),
)
def test_smart_resize_equals_the_reference_on_any_size(
    width: int, height: int, factor: int, low: int, extra: int
) -> None:
    bounds = {"factor": factor, "min_pixels": low, "max_pixels": low + extra}
    try:
        expected = reference_resize(height, width, **bounds)
    except ValueError:
        with pytest.raises(MediaError, match="at most 200 times"):
            smart_resize(width, height, **bounds)
        return
    assert smart_resize(width, height, **bounds) == expected[::-1]


def test_an_image_of_one_pixel_becomes_the_smallest_grid() -> None:
    assert image_grid(1, 1, CONFIG) == (1, 4, 4)
    assert num_tokens((1, 4, 4)) == 4


def test_an_image_of_1x10000_is_refused_with_the_limit() -> None:
    with pytest.raises(MediaError, match=r"1x10000 pixels; the longer side may be at most 200 times"):
        image_grid(1, 10000, CONFIG)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7])
def test_frames_are_cut_as_the_video_reference_cuts_them(num_frames: int) -> None:
    frames = np.stack([picture(56, 84, seed) for seed in range(num_frames)])
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    if num_frames % 2:
        video = torch.cat((video, video[:, -1:]), dim=1)
    pairs, rows, columns = video.shape[1] // 2, 84 // 14, 56 // 14
    cut = video.reshape(1, pairs, 2, 3, rows // 2, 2, 14, columns // 2, 2, 14).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    expected = cut.reshape(pairs * rows * columns, 3 * 2 * 14 * 14)
    assert np.array_equal(patchify(frames, CONFIG), expected.numpy())


def test_many_frames_share_one_pixel_budget() -> None:
    few = frame_size(1920, 1080, 4, CONFIG)
    many = frame_size(1920, 1080, 768, CONFIG)
    assert isinstance(CONFIG.video, Qwen2Video)
    assert math.prod(few) <= CONFIG.video.max_pixels
    assert math.prod(many) < math.prod(few)
    grid = video_grid(1920, 1080, 768, CONFIG)
    assert num_tokens(grid) <= CONFIG.video.max_tokens


def test_frames_of_different_sizes_are_refused() -> None:
    with pytest.raises(MediaError, match="one size; these have 56x56 and 84x56"):
        process_frames([picture(56, 56), picture(84, 56)], CONFIG, num_frames=2, seconds_per_grid=1.0)
    with pytest.raises(MediaError, match="no frame that"):
        process_frames([], CONFIG, num_frames=1, seconds_per_grid=1.0)


def test_a_video_has_the_grid_that_was_announced() -> None:
    frames = [picture(120, 90, seed) for seed in range(5)]
    processed = process_frames(iter(frames), CONFIG, num_frames=5, seconds_per_grid=0.5)
    assert processed.grid == video_grid(120, 90, 5, CONFIG)
    assert processed.features.shape == (math.prod(processed.grid), CONFIG.patch_dim)
    assert processed.seconds_per_grid == 0.5


def test_a_request_may_only_narrow_the_bounds() -> None:
    config = ProcessorConfig(min_pixels=4000, max_pixels=100_000)
    assert config.for_request(None, 50_000).max_pixels == 50_000
    assert config.for_request(None, None) == config
    with pytest.raises(MediaError, match="max_pixels is 200000; this server takes 4000 to 100000"):
        config.for_request(None, 200_000, "messages[0]")
    with pytest.raises(MediaError, match="min_pixels is 10"):
        config.for_request(10, None)
    with pytest.raises(MediaError, match="above"):
        config.for_request(60_000, 50_000)


BOUND = st.none() | st.integers(1, 10**8)


@given(BOUND, BOUND, BOUND, BOUND)
def test_whatever_bounds_are_accepted_are_in_order(
    server_min: int | None, server_max: int | None, low: int | None, high: int | None
) -> None:
    try:
        server = ProcessorConfig().with_server_bounds(server_min, server_max)
        request = server.for_request(low, high)
    except (CheckpointError, MediaError):
        return
    for config in (server, request):
        assert config.min_pixels <= config.max_pixels
        assert config.video.min_pixels <= config.video.max_pixels
    assert server.min_pixels <= request.min_pixels
    assert request.max_pixels <= server.max_pixels
    assert server.max_pixels == (server_max or max(ProcessorConfig().max_pixels, server_min or 0))


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_the_older_spelling_of_the_settings_is_read(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 16})
    config = ProcessorConfig.from_checkpoint(tmp_path)
    assert (config.min_pixels, config.max_pixels, config.patch_size) == (3136, 12845056, 16)
    assert (config.video.min_pixels, config.video.max_pixels) == (3136, 768 * 28 * 28)


def test_the_newer_spelling_of_the_settings_is_read(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"size": {"shortest_edge": 4000, "longest_edge": 90_000}})
    write(
        tmp_path, "video_preprocessor_config.json", {"size": {"shortest_edge": 5000, "longest_edge": 70_000}, "fps": 1}
    )
    config = ProcessorConfig.from_checkpoint(tmp_path)
    assert (config.min_pixels, config.max_pixels) == (4000, 90_000)
    assert (config.video.min_pixels, config.video.max_pixels, config.video.fps) == (5000, 70_000, 1.0)


def test_settings_nested_in_one_file_are_read(tmp_path: Path) -> None:
    image = {"size": {"shortest_edge": 4000, "longest_edge": 90_000}}
    write(tmp_path, "processor_config.json", {"image_processor": image, "video_processor": {"max_frames": 16}})
    config = ProcessorConfig.from_checkpoint(tmp_path)
    assert (config.min_pixels, config.video.max_frames) == (4000, 16)


def test_the_operators_bounds_replace_the_models(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056})
    config = ProcessorConfig.from_checkpoint(tmp_path, max_pixels=200_000)
    assert (config.min_pixels, config.max_pixels, config.video.max_pixels) == (3136, 200_000, 200_000)
    config = ProcessorConfig.from_checkpoint(tmp_path, max_pixels=2000)
    assert (config.min_pixels, config.max_pixels, config.video.min_pixels) == (2000, 2000, 2000)
    config = ProcessorConfig.from_checkpoint(tmp_path, min_pixels=10_000)
    assert (config.min_pixels, config.video.min_pixels) == (10_000, 10_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_mean": [0.5]}, "cannot be used"),
        ({"min_pixels": 10, "max_pixels": 5}, "above its max_pixels"),
        ([], "JSON object"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, settings: object, message: str) -> None:
    write(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(CheckpointError, match=message):
        ProcessorConfig.from_checkpoint(tmp_path)


def test_a_folder_without_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        ProcessorConfig.from_checkpoint(tmp_path)


def test_the_published_settings_of_qwen3_vl_are_read(tmp_path: Path) -> None:
    shared = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "processor_class": "Qwen3VLProcessor",
        **shared,
    }
    video = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"}
    write(tmp_path, "preprocessor_config.json", image)
    write(tmp_path, "video_preprocessor_config.json", {**video, **shared})
    config = ProcessorConfig.from_checkpoint(tmp_path)
    assert (config.factor, config.min_pixels, config.max_pixels) == (32, 65536, 16777216)
    assert (config.image_mean, config.patch_dim) == ((0.5, 0.5, 0.5), 1536)
    assert config.video == Qwen3Video()
