"""Frames, grids and times of videos against what the processors of `transformers` answered (`golden/videos.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.errors import MediaError
from dashinfer_vlm.processors.qwen import ProcessorConfig, video_grid
from dashinfer_vlm.processors.videos import (
    Qwen2Video,
    Qwen3Video,
    Sampling,
    VideoRule,
    grid_timestamps,
    read_rule,
    seconds_per_grid,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "videos.json").read_text())
FAMILIES = [name for name in GOLDEN if name != "transformers"]


def config(settings: dict[str, Any]) -> ProcessorConfig:
    rule = read_rule({}, settings)
    return ProcessorConfig(video=rule, patch_size=16 if isinstance(rule, Qwen3Video) else 14)


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_grids_and_times_are_those_of_the_familys_own_processor(family: str) -> None:
    answers = GOLDEN[family]["answers"]
    processor = config(GOLDEN[family]["settings"])
    assert len({tuple(answer["film"]) for answer in answers}) >= 60
    for answer in answers:
        total, width, height, fps = answer["film"]
        frames = processor.video.choose(total, fps, Sampling(**answer["request"]), 2)
        assert frames == answer["frames"], answer["film"]
        assert list(video_grid(width, height, len(frames), processor)) == answer["grid"], answer["film"]
        assert seconds_per_grid(len(frames), total, fps, 2) == pytest.approx(answer["seconds_per_grid"])
        times = grid_timestamps([frame / fps for frame in frames], 2)
        assert times == pytest.approx(answer["timestamps"], abs=6e-4)


RULES: tuple[VideoRule, ...] = (Qwen2Video(), Qwen3Video(), Qwen3Video(capped=True))


@pytest.mark.parametrize("rule", RULES)
@given(st.integers(1, 200_000), st.floats(0.1, 240), st.floats(0.01, 60), st.integers(1, 768))
def test_chosen_frames_ascend_and_exist(rule: VideoRule, total: int, video_fps: float, fps: float, most: int) -> None:
    for sampling in (Sampling(fps=fps), Sampling(num_frames=most), Sampling(fps=fps, max_frames=most)):
        frames = rule.choose(total, video_fps, sampling, 2)
        assert frames == sorted(set(frames))
        assert 0 <= frames[0] <= frames[-1] < total
        assert len(frames) <= max(most + 1, 4) if sampling.num_frames else len(frames) <= 768


@pytest.mark.parametrize("rule", RULES)
def test_a_video_of_one_frame_is_used_whole_and_one_of_none_not_at_all(rule: VideoRule) -> None:
    assert rule.choose(1, 30.0, Sampling(), 2) == [0]
    assert rule.choose(0, 30.0, Sampling(), 2) == []
    assert min(rule.size(640, 480, 1, factor=28, step=2)) >= 28


def test_a_shorter_video_is_used_whole_where_more_frames_are_asked_for() -> None:
    assert Qwen2Video().choose(7, 30.0, Sampling(num_frames=100), 2) == [0, 1, 2, 3, 4, 5]
    assert Qwen3Video().choose(7, 30.0, Sampling(num_frames=100), 2) == list(range(7))


def test_bounds_of_a_frame_hold_for_qwen3_too() -> None:
    rule = Qwen3Video().for_server(None, 200_000)
    width, height = rule.size(1920, 1080, 8, factor=32, step=2)
    assert width * height <= 200_000
    narrower = rule.for_request(None, 50_000, None)
    width, height = narrower.size(1920, 1080, 8, factor=32, step=2)
    assert width * height <= 50_000
    width, height = rule.for_request(None, None, 100_000).size(1920, 1080, 8, factor=32, step=2)
    assert width * height * 8 <= 2 * 100_000


def test_an_impossible_shape_is_refused_by_both() -> None:
    for rule in RULES:
        with pytest.raises(MediaError, match="at most 200 times"):
            rule.size(1, 1000, 4, factor=28, step=2)


def test_the_published_settings_choose_the_rule() -> None:
    assert isinstance(read_rule({"processor_class": "Qwen2_5_VLProcessor"}, None), Qwen2Video)
    assert isinstance(read_rule({"processor_class": "Qwen3VLProcessor"}, None), Qwen3Video)
    rule = read_rule(
        {}, {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"longest_edge": 9_000_000}, "fps": 1}
    )
    assert rule == Qwen3Video(max_pixels=9_000_000, fps=1.0)
