"""`VLM` and `Encoder` with an adapter: named beside its model, or in place of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm import VLM, SamplingParams
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.offline import Encoder
from tests.conftest import CheckpointMaker
from tests.models.adapters import Adapter
from tests.models.driving import load_hf
from tests.offline.test_vlm import picture, question

OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_length": 512, "kv_cache_gib": 0.05, "threads": 1}
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
ASKED = question(picture(), "What?")


@pytest.fixture
def lora(checkpoint: CheckpointMaker, tmp_path: Path) -> Path:
    model = str(checkpoint())
    return Adapter(load_hf(checkpoint())).write(tmp_path / "adapter", base_model_name_or_path=model)


def test_answers_are_the_merged_models(checkpoint: CheckpointMaker, lora: Path, tmp_path: Path) -> None:
    hf = load_hf(checkpoint())
    Adapter(hf).merge()
    exported = shutil.copytree(checkpoint(), tmp_path / "exported")
    hf.save_pretrained(exported)
    answers = []
    ways: list[tuple[Path, dict[str, Any]]] = [
        (exported, {}),
        (checkpoint(), {"lora": lora}),
        (lora, {"vision_workers": 1}),
        (checkpoint(), {}),
    ]
    for model, options in ways:
        with VLM(model, progress=False, **OPTIONS, **options) as vlm:
            assert vlm.info.lora == (str(lora) if lora in (model, options.get("lora")) else None)
            answers.append(vlm.chat(ASKED, GREEDY).token_ids)
    assert answers[0] == answers[1] == answers[2] != answers[3]


def test_so_are_embeddings(checkpoint: CheckpointMaker, lora: Path) -> None:
    found = []
    for model, adapter in ((checkpoint(), lora), (lora, None), (checkpoint(), None)):
        with Encoder(model, lora=adapter, dtype="float32", device="cpu", threads=1) as encoder:
            found.append(encoder.encode(ASKED).embeddings[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_adapter_that_cannot_be_used_is_refused(checkpoint: CheckpointMaker, lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin may hold code and is not read"):
        VLM(checkpoint(), lora=lora, progress=False, **OPTIONS)
