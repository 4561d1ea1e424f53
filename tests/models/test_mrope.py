"""Positions against the golden ones of `transformers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from dashinfer_vlm.models.mrope import mrope_positions
from dashinfer_vlm.request import Item
from tests.models.driving import Prompt, image, prompt

SHORT = image(140, 112, frames=4, seconds_per_grid=1.0)
SLOW = image(280, 56, frames=4, seconds_per_grid=1.3)
PROMPTS = {
    "text only": prompt(9),
    "one image": prompt(3, image(168, 112), 4),
    "interleaved images": prompt(image(56, 56), 2, image(28, 196), 1, image(140, 28)),
    "video": prompt(5, SHORT, 6),
    "image and videos": prompt(2, image(56, 84), 1, SLOW, 3, SHORT, 2),
}


@pytest.fixture(params=PROMPTS)
def case(request: pytest.FixtureRequest) -> Prompt:
    return PROMPTS[request.param]


def golden(model_class: Any, config: Any, case: Prompt) -> tuple[torch.Tensor, int]:
    inputs = {"mm_token_type_ids": torch.zeros(1, len(case.ids), dtype=torch.int32)} | case.hf_inputs()
    for name in ("pixel_values", "pixel_values_videos"):
        inputs.pop(name, None)
    holder = model_class.__new__(model_class)
    torch.nn.Module.__init__(holder)
    holder.config = config
    positions, deltas = holder.get_rope_index(**inputs)
    return positions[:, 0], int(deltas)


def test_positions_of_qwen2_vl_are_golden(case: Prompt) -> None:
    positions, offset = mrope_positions(len(case.ids), case.items, merge_size=2)
    expected, delta = golden(Qwen2VLModel, Qwen2VLConfig(), case)
    assert positions.tolist() == expected.tolist()
    assert offset == delta
    assert positions.dtype == np.int64


@pytest.mark.parametrize("tokens_per_second", [1, 2])
def test_positions_of_qwen2_5_vl_are_golden(case: Prompt, tokens_per_second: int) -> None:
    rate = float(tokens_per_second)
    positions, offset = mrope_positions(len(case.ids), case.items, merge_size=2, tokens_per_second=rate)
    config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": tokens_per_second})
    expected, delta = golden(Qwen2_5_VLModel, config, case)
    assert positions.tolist() == expected.tolist()
    assert offset == delta


def test_text_after_a_long_video_begins_one_past_its_last_frame() -> None:
    case = prompt(2, image(56, 28, frames=6, seconds_per_grid=1.5), 2)
    positions, offset = mrope_positions(len(case.ids), case.items, merge_size=2, tokens_per_second=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 5, 5, 8, 8, 9, 10],
        [0, 1, 2, 2, 2, 2, 2, 2, 9, 10],
        [0, 1, 2, 3, 2, 3, 2, 3, 9, 10],
    ]
    assert offset == 11 - 10


def test_an_item_without_a_grid_counts_like_text() -> None:
    item = Item(kind="image", start=2, num_tokens=3, content_hash=b"", embedding=torch.zeros(3, 8))
    positions, offset = mrope_positions(7, [item], merge_size=2)
    assert positions.tolist() == [list(range(7))] * 3
    assert offset == 0
