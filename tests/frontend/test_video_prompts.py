"""From a film's frames and rate to the ids and positions of its prompt, by each family's own processor and model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from dashinfer_vlm.frontend.checkpoint import FrontendConfig
from dashinfer_vlm.frontend.expansion import Expander
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.media.types import LoadedMedia
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.processors.qwen import ProcessorConfig, video_grid
from dashinfer_vlm.processors.videos import Sampling, grid_timestamps, read_rule, seconds_per_grid
from dashinfer_vlm.shared_array import SharedArray
from tests.conftest import CheckpointMaker
from tests.frontend.test_expansion import END, PAD, START, ids_of
from tests.tokens import VISION_END

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "processors" / "golden" / "videos.json").read_text())
REFERENCE: dict[str, tuple[Any, Any, int]] = {
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLModel, 14),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2_5_VLModel, 14),
    "qwen3_vl": (Qwen3VLProcessor, Qwen3VLModel, 16),
}
"""Processor, model, side of a patch."""
MAX_TOKENS = 1500
"""Of a film here: the reference takes seconds for the longest ones."""


@pytest.mark.parametrize("family", REFERENCE)
def test_ids_and_positions_of_films_are_those_of_the_reference(checkpoint: CheckpointMaker, family: str) -> None:
    folder, settings = checkpoint(family), GOLDEN[family]["settings"]
    front, config = FrontendConfig.from_folder(folder), read_config(folder)
    expander = Expander(Tokenizer.from_folder(folder), front.placeholder_ids, front.expand_item)
    cutting = ProcessorConfig(video=read_rule({}, settings), patch_size=REFERENCE[family][2])
    template = ids_of(expander.tokenizer, f"<|im_start|>user\n{START}{PAD['video']}{END}Why?<|im_end|>")
    films = [each for each in GOLDEN[family]["answers"] if num_tokens_of(each["grid"]) <= MAX_TOKENS]
    assert len({tuple(each["film"]) for each in films}) >= 20
    for each in films:
        ids, items = expander(template, [medium(each, cutting)], "messages")
        expected = golden_ids(expander.tokenizer, family, each)
        assert ids == expected, each["film"]
        positions, offset = config.family.positions(config, len(ids), items)
        golden, delta = golden_positions(folder, family, expected, each)
        assert torch.equal(torch.from_numpy(positions), golden), each["film"]
        assert offset == delta, each["film"]


def num_tokens_of(grid: Sequence[int]) -> int:
    return grid[0] * grid[1] * grid[2] // 4


def medium(answer: dict[str, Any], cutting: ProcessorConfig) -> LoadedMedia:
    """What the media room makes of the film; the answer's own frames, grid and times are not looked at."""
    total, width, height, fps = answer["film"]
    frames = cutting.video.choose(total, fps, Sampling(**answer["request"]), 2)
    grid = video_grid(width, height, len(frames), cutting)
    num_tokens = num_tokens_of(grid)
    return LoadedMedia(
        kind="video",
        grid=grid,
        num_tokens=num_tokens,
        content_hash=bytes(32),
        features=SharedArray("nowhere", (4 * num_tokens, cutting.patch_dim), "|u1"),
        release=lambda: None,
        timestamps=grid_timestamps([frame / fps for frame in frames], 2),
        seconds_per_grid=seconds_per_grid(len(frames), total, fps, 2),
    )


def golden_ids(tokenizer: Tokenizer, family: str, answer: dict[str, Any]) -> list[int]:
    """The processor of the reference needs torchvision to be made whole."""
    processor = REFERENCE[family][0].__new__(REFERENCE[family][0])
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor.vision_start_token, processor.vision_end_token, processor.video_token = START, END, PAD["video"]
    metadata = SimpleNamespace(fps=answer["film"][3], frames_indices=list(answer["frames"]))
    inputs = {"video_grid_thw": torch.tensor([answer["grid"]]), "video_metadata": [metadata]}
    text = processor.replace_video_token(inputs, 0)
    outer = text if family == "qwen3_vl" else f"{START}{text}{END}"
    return ids_of(tokenizer, f"<|im_start|>user\n{outer}Why?<|im_end|>")


def golden_positions(folder: Path, family: str, ids: Sequence[int], answer: dict[str, Any]) -> tuple[torch.Tensor, int]:
    model = REFERENCE[family][1].__new__(REFERENCE[family][1])
    torch.nn.Module.__init__(model)
    model.config = AutoConfig.from_pretrained(folder)
    row = torch.tensor([ids])
    inputs = {"input_ids": row, "mm_token_type_ids": 2 * (row == model.config.video_token_id).int()}
    inputs["video_grid_thw"] = torch.tensor([answer["grid"]])
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([answer["seconds_per_grid"]])
    positions, delta = model.get_rope_index(**inputs)
    return (positions[:, 0], int(delta)) if family == "qwen3_vl" else after_the_last_frame(positions[:, 0], row)


def after_the_last_frame(positions: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Text goes on one past the largest position of the video, as published; version 5 lets it begin among the frames'
    positions where there are more of them than rows and columns (see `models.mrope`)."""
    after = int((row[0] == VISION_END).nonzero()[-1])
    moved = positions.clone()
    moved[:, after:] += positions[:, :after].max() + 1 - positions[0, after]
    return moved, int(moved[0, -1]) + 1 - row.shape[1]
