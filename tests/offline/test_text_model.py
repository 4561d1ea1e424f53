"""A text model behind the same front end: it answers, and says of pictures and videos that it takes none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.errors import CheckpointError, ConfigError, InvalidRequestError
from dashinfer_vlm.offline import Encoder
from tests.conftest import CheckpointMaker

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def text_model(checkpoint: CheckpointMaker) -> Iterator[VLM]:
    with VLM(
        checkpoint("qwen3"), dtype="float32", device="cpu", max_length=256, kv_cache_gib=0.05, threads=1, progress=False
    ) as loaded:
        yield loaded


def test_it_answers(text_model: VLM) -> None:
    assert len(text_model.chat("Hello", GREEDY).token_ids) == 4
    assert text_model.info.max_item_patches == 0
    assert text_model.stats().num_items_encoded_total == 0


@pytest.mark.parametrize("kind", ["image", "video"])
def test_it_takes_no_pictures_and_no_videos(text_model: VLM, kind: str) -> None:
    part: object = Image.new("RGB", (28, 28))
    if kind == "video":
        part = {"type": "video", "video": np.zeros((4, 28, 28, 3), np.uint8)}
    with pytest.raises(InvalidRequestError, match=f"the model takes no {kind} input"):
        text_model.chat([{"role": "user", "content": [part, "What is this?"]}], GREEDY)


def test_it_has_no_encoder_to_be_run_alone(checkpoint: CheckpointMaker) -> None:
    with pytest.raises(CheckpointError, match="is a text model"):
        Encoder(checkpoint("qwen3"), device="cpu", threads=1)


def test_bounds_for_pictures_mean_nothing_to_it(checkpoint: CheckpointMaker) -> None:
    with pytest.raises(ConfigError, match="--min-pixels and --max-pixels mean nothing to Qwen3ForCausalLM"):
        VLM(
            checkpoint("qwen3"),
            max_pixels=10**6,
            device="cpu",
            kv_cache_gib=0.05,
            max_length=256,
            threads=1,
            progress=False,
        )
