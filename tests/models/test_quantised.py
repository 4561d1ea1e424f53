"""Quantised at load: the logits stay near those of the weights as they are stored, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops, cuda
from dashinfer_vlm.layers import backend
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.models.driving import Driver, image, prompt

needs_kernels = pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
CASE = prompt(9, image(112, 84, 1), 12, seed=3)


def load(checkpoint: CheckpointMaker, arch: str, **options: str) -> Model:
    model = str(checkpoint(arch, size="small"))
    return load_model(EngineConfig(model=model, dtype="bfloat16", device="cpu", quant_cache_gib=0, **options))  # type: ignore[arg-type]


def logits(model: Model) -> torch.Tensor:
    driver = Driver(model)
    return driver.run(driver.start(CASE))


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@needs_kernels
@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"quant_type": "a8w8"}, 0.05),
        ({"quant_type": "a16w8"}, 0.03),
        ({"quant_type": "a16w4"}, 0.25),
        ({"vision_quant_type": "a8w8"}, 0.05),
        ({"quant_type": "a8w8", "vision_quant_type": "a8w8"}, 0.06),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_the_logits_stay_near_those_of_the_stored_weights(
    checkpoint: CheckpointMaker, arch: str, options: dict[str, str], most: float
) -> None:
    error = relative_error(logits(load(checkpoint, arch, **options)), logits(load(checkpoint, arch)))
    assert 0 < error < most


def test_without_the_native_kernels_it_is_refused(checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "available", lambda: False)
    monkeypatch.setattr(cpu_ops, "why_unavailable", lambda: "not built")
    with pytest.raises(ConfigError, match="a8w8 needs the native kernels: not built"):
        load(checkpoint, "qwen2_vl", quant_type="a8w8")


def test_on_a_card_it_needs_the_kernels_for_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no triton")
    with pytest.raises(ConfigError, match="a16w4 needs the kernels for cards: no triton"):
        backend.choose_backend(torch.device("cuda"), torch.bfloat16, "a16w4")
