"""Each rank adds its part of an adapter to its part of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.engine.parallel.test_ranks import config_of
from tests.engine.test_parity import Family, mixed_prompts, run
from tests.models.adapters import Adapter
from tests.models.driving import load_hf


def test_two_ranks_merge_an_adapter_as_one_does(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = checkpoint("qwen2_5_vl")
    lora = str(Adapter(load_hf(folder)).write(tmp_path))
    family = Family(folder, None, load_model(config_of(folder, 1)))
    request = family.request("one1", mixed_prompts(family)["one1"], max_tokens=8)
    answers = []
    for config in (
        replace(config_of(folder, 2), lora=lora),
        replace(config_of(folder, 1), lora=lora),
        config_of(folder, 1),
    ):
        engine, info = load_engine(config, lambda *_: None)
        assert info.lora == config.lora
        answers.append(run(engine, request))
        engine.close()
    assert answers[0] == answers[1] != answers[2]
