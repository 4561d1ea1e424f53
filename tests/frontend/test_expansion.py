"""Placeholders become what the family writes: one run each, or a video of Qwen3-VL with the time of each step."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3VLProcessor

from dashinfer_vlm.frontend.checkpoint import FrontendConfig
from dashinfer_vlm.frontend.expansion import Expander
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from dashinfer_vlm.media.types import LoadedMedia
from dashinfer_vlm.models.families import qwen3_vl
from dashinfer_vlm.request import ItemKind
from dashinfer_vlm.shared_array import SharedArray
from tests.conftest import CheckpointMaker
from tests.tokens import VISION_END, VISION_START

START, END, PAD = "<|vision_start|>", "<|vision_end|>", {"image": "<|image_pad|>", "video": "<|video_pad|>"}
GRID = (3, 4, 6)
FRAMES, FPS = [0, 12, 24, 36, 48], 25.0
"""Five frames: the last pair repeats its only one."""


@pytest.fixture(scope="module")
def expander(checkpoint: CheckpointMaker) -> Expander:
    folder = checkpoint("qwen3_vl")
    config = FrontendConfig.from_folder(folder)
    return Expander(Tokenizer.from_folder(folder), config.placeholder_ids, config.expand_item)


def medium(kind: ItemKind, timestamps: tuple[float, ...] = ()) -> LoadedMedia:
    grid = GRID if kind == "video" else (1, 4, 4)
    num_tokens = grid[0] * grid[1] * grid[2] // 4
    features = SharedArray("nowhere", (4 * num_tokens, 1536), "|u1")
    return LoadedMedia(
        kind=kind, grid=grid, num_tokens=num_tokens, content_hash=bytes(32), features=features, release=lambda: None,
        timestamps=timestamps,
    )  # fmt: skip


def golden_video() -> tuple[tuple[float, ...], str]:
    """Times and text of the reference, whose processor needs torchvision to be made whole."""
    processor: Any = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor.vision_start_token, processor.vision_end_token, processor.video_token = START, END, PAD["video"]
    metadata = SimpleNamespace(fps=FPS, frames_indices=list(FRAMES))
    text = processor.replace_video_token({"video_grid_thw": torch.tensor([GRID]), "video_metadata": [metadata]}, 0)
    return tuple(processor._calculate_timestamps(list(FRAMES), FPS, 2)), text


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """As the reference's tokenizer gives them: text is split at special tokens alone."""
    pieces = re.split("(" + "|".join(map(re.escape, tokenizer.added)) + ")", text)
    pairs = ((tokenizer.added.get(piece), piece) for piece in pieces)
    return [i for token, piece in pairs for i in (tokenizer.encode_text(piece) if token is None else [token])]


@pytest.mark.parametrize("replaces_frame", [True, False], ids=["as in 4.57", "as in 5"])
@pytest.mark.parametrize("before", ["user\n", "Look: ", "what of this<", "", "a word " * 200], ids=len)
def test_a_video_is_written_as_by_the_reference(
    expander: Expander, monkeypatch: pytest.MonkeyPatch, before: str, replaces_frame: bool
) -> None:
    monkeypatch.setattr(qwen3_vl, "REPLACES_FRAME", replaces_frame)
    times, text = golden_video()
    assert text.startswith("<0.2 seconds>")
    written = ids_of(expander.tokenizer, f"<|im_start|>{before}{START}{PAD['video']}{END} after")
    outer = text if replaces_frame else f"{START}{text}{END}"
    ids, items = expander(written, [medium("video", times)], "messages")
    assert ids == ids_of(expander.tokenizer, f"<|im_start|>{before}{outer} after")
    video = expander.placeholder_ids["video"]
    assert [(item.first_row, item.num_tokens, item.num_rows) for item in items] == [(0, 6, 18), (6, 6, 18), (12, 6, 18)]
    for item in items:
        assert ids[item.start : item.end] == [video] * 6
        assert (ids[item.start - 1], ids[item.end]) == (VISION_START, VISION_END)


def test_a_placeholder_without_a_frame_is_replaced_alone(expander: Expander) -> None:
    times, text = golden_video()
    written = ids_of(expander.tokenizer, f"x{PAD['video']}{END}")
    ids, _ = expander(written, [medium("video", times)], "messages")
    assert ids == ids_of(expander.tokenizer, f"x{text}{END}")


def test_images_beside_it_keep_their_frames(expander: Expander) -> None:
    times, text = golden_video()
    picture = f"{START}{PAD['image']}{END}"
    written = ids_of(expander.tokenizer, f"{picture}{START}{PAD['video']}{END}{picture}")
    ids, items = expander(written, [medium("image"), medium("video", times), medium("image")], "messages")
    whole = f"{START}{PAD['image'] * 4}{END}"
    assert ids == ids_of(expander.tokenizer, f"{whole}{text}{whole}")
    assert [item.kind for item in items] == ["image", "video", "video", "video", "image"]
