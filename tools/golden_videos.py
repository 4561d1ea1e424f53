"""Write `tests/processors/golden/videos.json`: what the video processors of `transformers` answer, per family.

Needs torchvision beside torch, which the project itself does without; the tests read the file. Run once, and again when
the processors change:  python tools/golden_videos.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_OPERATORS = torch.library.Library(
    "torchvision", "DEF"
)  # a torchvision that was built for another torch looks for them
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import Qwen3VLProcessor, __version__  # noqa: E402
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # noqa: E402
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

TARGET = Path(__file__).resolve().parents[1] / "tests" / "processors" / "golden" / "videos.json"

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2.0, "cap_pixels_per_frame": True},
    "qwen2_5_vl": {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "fps": 2.0,
        "cap_pixels_per_frame": False,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    },
    "qwen3_vl": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    },
    "qwen3_vl_capped": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "cap_pixels_per_frame": True,
    },
}
"""The settings of a checkpoint of each family, as `video_preprocessor_config.json` holds them."""

FILMS: tuple[tuple[int, int, int, float], ...] = (
    (2, 64, 64, 30.0), (3, 64, 48, 30.0), (4, 56, 56, 25.0), (5, 100, 60, 25.0), (7, 33, 65, 24.0), (9, 10, 300, 12.5),
    (10, 320, 240, 10.0), (11, 176, 144, 10.0), (12, 640, 480, 1.0), (13, 640, 360, 5.0), (17, 480, 640, 15.0),
    (24, 1920, 1080, 24.0), (25, 1080, 1920, 25.0), (29, 224, 224, 29.97), (30, 20, 20, 30.0), (31, 448, 448, 30.0),
    (48, 1280, 720, 24.0), (49, 854, 480, 23.976), (50, 640, 480, 50.0), (59, 640, 480, 59.94), (60, 3840, 2160, 60.0),
    (61, 2160, 3840, 60.0), (72, 320, 180, 12.0), (75, 352, 288, 25.0), (90, 1920, 800, 30.0), (97, 500, 375, 30.0),
    (100, 501, 377, 25.0), (101, 28, 28, 25.0), (113, 32, 32, 29.97), (120, 64, 6400, 30.0), (121, 1280, 720, 30.0),
    (144, 1280, 536, 23.976), (150, 426, 240, 15.0), (181, 640, 360, 30.0), (199, 1440, 1080, 60.0),
    (200, 720, 576, 25.0), (240, 720, 480, 29.97), (250, 1280, 720, 25.0), (299, 1024, 768, 30.0), (300, 1920, 1080, 30.0),  # noqa: E501
    (301, 540, 960, 30.0), (360, 256, 256, 12.0), (450, 400, 300, 29.97), (500, 640, 480, 7.5), (599, 608, 1080, 30.0),
    (600, 1920, 1080, 60.0), (719, 640, 360, 23.976), (900, 854, 480, 30.0), (1000, 300, 300, 3.0), (1201, 1280, 720, 30.0),  # noqa: E501
    (1500, 1920, 1080, 25.0), (1799, 480, 270, 29.97), (1800, 1280, 720, 30.0), (2500, 640, 480, 25.0),
    (3000, 160, 120, 10.0), (3597, 854, 480, 29.97), (3600, 1280, 720, 30.0), (5000, 640, 360, 25.0),
    (7200, 1920, 1080, 24.0), (9000, 640, 480, 30.0), (10789, 426, 240, 29.97), (14400, 640, 360, 24.0),
    (21600, 320, 240, 30.0), (54000, 640, 360, 30.0), (107892, 640, 360, 29.97), (216000, 1280, 720, 60.0),
)  # fmt: skip
"""(frames, width, height, frames per second)."""

REQUESTS: tuple[dict[str, float], ...] = (
    {"fps": 0.5}, {"fps": 1.0}, {"fps": 4.0}, {"fps": 7.3}, {"num_frames": 2}, {"num_frames": 6}, {"num_frames": 7},
)  # fmt: skip
"""Beside the settings: one of these per film, taken in turns, and none for each."""


def processor(settings: dict[str, Any]) -> Any:
    known = {"Qwen2VLVideoProcessor": Qwen2VLVideoProcessor, "Qwen3VLVideoProcessor": Qwen3VLVideoProcessor}
    kwargs = {key: value for key, value in settings.items() if key != "video_processor_type"}
    return known[settings["video_processor_type"]](**kwargs)


def answer(made: Any, film: tuple[int, int, int, float], request: dict[str, float]) -> dict[str, Any] | None:
    """None where the processor itself cannot."""
    total, width, height, fps = film
    metadata = VideoMetadata(total_num_frames=total, fps=fps, width=width, height=height)
    try:
        frames = [int(i) for i in made.sample_frames(metadata, **request)]
        metadata.frames_indices = frames
        video = torch.empty((1, len(frames), 3, height, width), dtype=torch.uint8, device="meta")
        size = _size(made, video)
    except (ValueError, RuntimeError, ZeroDivisionError):
        return None
    pairs = -(-len(frames) // made.temporal_patch_size)
    text = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    return {
        "film": film,
        "request": request,
        "frames": frames,
        "grid": (pairs, size[0] // made.patch_size, size[1] // made.patch_size),
        "seconds_per_grid": made.temporal_patch_size / metadata.sampled_fps,
        "timestamps": [
            round(float(t), 3) for t in text._calculate_timestamps(list(frames), fps, made.temporal_patch_size)
        ],
    }


def _size(made: Any, video: torch.Tensor) -> tuple[int, int]:
    """(height, width) that the processor asks its base class for; no pixel is computed."""
    asked: list[Any] = []
    base = type(made).__mro__[1]
    resize = base.resize
    base.resize = lambda _, image, size, resample: asked.append(size)
    try:
        factor = made.patch_size * made.merge_size
        made.resize(video, made.size, made.resample, factor, made.temporal_patch_size, made.cap_pixels_per_frame)
    finally:
        base.resize = resize
    return asked[0].height, asked[0].width


def main() -> None:
    families = {}
    for name, settings in FAMILIES.items():
        made = processor(settings)
        asked = [(film, {}) for film in FILMS]
        asked += [(film, REQUESTS[number % len(REQUESTS)]) for number, film in enumerate(FILMS)]
        answers = [found for film, request in asked if (found := answer(made, film, request)) is not None]
        families[name] = {"settings": settings, "answers": answers}
        print(f"{name}: {len(answers)} of {len(asked)}")
    TARGET.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {_lines(family)}" for name, family in families.items())
    TARGET.write_text(f'{{"transformers": {json.dumps(__version__)},\n{lines}}}\n')


def _lines(family: dict[str, Any]) -> str:
    """One answer a line, so that a difference can be read."""
    answers = ",\n".join(json.dumps(answer, separators=(",", ":")) for answer in family["answers"])
    return f'{{"settings": {json.dumps(family["settings"])}, "answers": [\n{answers}\n]}}'


if __name__ == "__main__":
    main()
