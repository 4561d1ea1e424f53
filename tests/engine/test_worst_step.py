"""What a card's memory is divided by: the heaviest step, done once before the KV cache takes what it leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dashinfer_vlm.config import EngineConfig, ScheduleName
from dashinfer_vlm.engine import memory
from dashinfer_vlm.engine.cards.worst_step import SLACK_BYTES, largest_picture, worst_step_bytes
from dashinfer_vlm.engine.memory import EMBEDDING_HEADROOM_BYTES, kv_block_bytes, num_kv_blocks
from dashinfer_vlm.models.base import KVCache, StepBatch
from dashinfer_vlm.models.config import VisionConfig, read_config
from tests.conftest import CheckpointMaker
from tests.engine.scripted_model import VOCAB, ScriptedModel


class SeeingModel(ScriptedModel):
    """Remembers the batches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[StepBatch] = []

    def forward(self, batch: StepBatch, kv: KVCache) -> torch.Tensor:
        self.batches.append(batch)
        return torch.zeros(len(batch.logits_rows), VOCAB)


class SaidMeter:
    """Does what is to be measured, and says that it took so much."""

    def __init__(self, *peaks: int) -> None:
        self._peaks = list(peaks)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return self._peaks.pop(0)


@pytest.fixture
def vision(checkpoint: CheckpointMaker) -> VisionConfig:
    found = read_config(checkpoint()).vision
    assert found is not None
    return found


def test_the_step_has_all_rows_and_a_token_for_every_sequence(vision: VisionConfig) -> None:
    model = SeeingModel()
    config = EngineConfig(max_num_seqs=24)
    worst_step_bytes(model, vision, config, 100, SaidMeter(0, 0))
    (batch,) = model.batches
    assert batch.ids.shape == (100,)
    assert batch.logits_rows.shape == batch.context_lens.shape == (24,)
    assert int(batch.context_lens.sum()) == 100
    assert model.encoder.num_begun == 1


def test_the_largest_picture_is_measured_by_a_smaller_one(vision: VisionConfig) -> None:
    config = EngineConfig(max_pixels=32768 * vision.patch_size**2)
    assert largest_picture(vision, config) == 32768
    measured = worst_step_bytes(SeeingModel(), vision, config, 8, SaidMeter(1000, 500))
    assert measured == 2 * 1000 + 4 * 500 + SLACK_BYTES


@pytest.mark.parametrize(("schedule", "times"), [("balanced", 2), ("throughput", 8)])
def test_small_pictures_are_still_encoded_many_at_a_time(
    vision: VisionConfig, schedule: ScheduleName, times: int
) -> None:
    """More of them for crowds that do not watch their streams."""
    config = EngineConfig(max_pixels=vision.patch_size**2 * 64, min_pixels=1, schedule=schedule)
    assert worst_step_bytes(SeeingModel(), vision, config, 8, SaidMeter(0, 500)) == times * 500 + SLACK_BYTES


def test_the_cache_takes_what_the_step_and_embeddings_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = ScriptedModel(), EngineConfig(max_model_len=512, vision_cache_gib=0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000 + EMBEDDING_HEADROOM_BYTES)
    assert num_kv_blocks(model, config, reserved=4_000) == 6_000 // kv_block_bytes(model, config)
