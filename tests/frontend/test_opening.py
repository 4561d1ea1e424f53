"""What is wrong with a model folder, or with the settings beside it, is said before there is an engine."""

from __future__ import annotations

from typing import Any

import pytest

from dashinfer_vlm.config import EngineConfig, MediaConfig
from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.frontend.opening import open_service
from tests.conftest import CheckpointMaker


async def no_engine(config: EngineConfig) -> EngineClient:
    pytest.fail("the engine is started")


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("qwen2_vl", {"max_model_len": 10_000_000}, "--max-model-len is 10000000, the model's context is"),
        ("qwen2", {"vision_workers": 1}, "--vision-workers is set, but Qwen2ForCausalLM is a text model"),
        ("qwen2", {"vision_quant_type": "a8w8"}, "--vision-quant-type is set"),
        ("qwen2", {"max_pixels": 10_000}, "--min-pixels and --max-pixels mean nothing"),
    ],
)
async def test_settings_that_the_model_cannot_have_are_refused_before_the_engine_starts(
    checkpoint: CheckpointMaker, arch: str, settings: dict[str, Any], message: str
) -> None:
    config = EngineConfig(model=str(checkpoint(arch)), **settings)
    with pytest.raises(ConfigError, match=message):
        async with open_service(config, MediaConfig(), start_engine=no_engine):
            pass
