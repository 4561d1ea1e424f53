"""Embeddings in messages: a picture that was encoded elsewhere means what the picture means."""

from __future__ import annotations

import base64

import pytest
import torch
from safetensors.torch import save

from dashinfer_vlm import VLM
from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.offline import Encoder
from tests.conftest import CheckpointMaker
from tests.offline.test_vlm import GREEDY, picture, question, trace

GRID = (1, 4, 6)


def part(rows: torch.Tensor, grid: tuple[int, int, int] = GRID) -> dict[str, object]:
    files = {"image_embeds": {"x": rows}, "image_grid_thw": {"x": torch.tensor(grid)}}
    coded = {name: base64.b64encode(save(tensors)).decode() for name, tensors in files.items()}
    return {"type": "image_embeds", "image_embeds": coded}


def test_a_picture_and_its_embedding_mean_the_same(vlm: VLM, checkpoint: CheckpointMaker) -> None:
    image = picture()
    with Encoder(checkpoint(), dtype="float32", device="cpu", threads=1) as encoder:
        made = encoder.encode(question(image, "What?"))
    sent = part(made.embeddings[0], made.grids[0])
    expected = vlm.chat(question(image, "What?"), GREEDY)
    result = vlm.chat(question(sent, "What?"), GREEDY)
    assert trace(result) == pytest.approx(trace(expected), abs=1e-4)
    assert result.usage.num_prompt_tokens == expected.usage.num_prompt_tokens
    other = vlm.chat(question(part(made.embeddings[0].roll(1, 0), made.grids[0]), "What?"), GREEDY)
    assert trace(other) != pytest.approx(trace(expected), abs=1e-5)


def test_an_embedding_of_another_width_is_refused(vlm: VLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"an embedding has shape \(6, 7\)"):
        vlm.chat(question(part(torch.zeros(6, 7)), "What?"), GREEDY)
    assert vlm.chat("still there?", GREEDY).token_ids


def test_the_encoder_has_nothing_to_do_with_embeddings(checkpoint: CheckpointMaker) -> None:
    with (
        Encoder(checkpoint(), dtype="float32", device="cpu", threads=1, enable_mm_embeds=True) as encoder,
        pytest.raises(InvalidRequestError, match="encoded already"),
    ):
        encoder.encode(question(part(torch.zeros(6, 128)), "What?"))
