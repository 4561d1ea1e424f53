"""Adapters that PEFT itself has written, against what PEFT makes of the model; `make test-peft` installs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.models import driving, qwen3_vl
from tests.models.driving import Driver, Prompt, hf_logits, image, prompt

peft = pytest.importorskip("peft", reason="needs PEFT")

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "v_proj", "qkv", "down_proj"], "exclude_modules": ["gate_proj"]},
    "rank stabilised": {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": "gaussian"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.o_proj": 6, "^lm_head": 3},
        "alpha_pattern": {"v_proj": 3, "attn.qkv": 24},
    },
    "a convolution": {"target_modules": ["q_proj", "patch_embed.proj"]},
    "some layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


def compare(folder: Path, tmp_path: Path, case: Prompt, **settings: Any) -> None:
    torch.manual_seed(0)
    hf = driving.load_hf(folder)
    plain = hf_logits(hf, case)
    adapted = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.1)
    adapted.save_pretrained(tmp_path)
    model = load_model(EngineConfig(model=str(folder), lora=str(tmp_path), dtype="float32", device="cpu"))
    driver, theirs = Driver(model), hf_logits(adapted, case)
    torch.testing.assert_close(driver.run(driver.start(case)), theirs, atol=1e-4, rtol=0)
    assert (theirs - plain).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("form", SETTINGS)
def test_settings_of_all_kinds(checkpoint: CheckpointMaker, tmp_path: Path, arch: str, form: str) -> None:
    compare(checkpoint(arch), tmp_path, prompt(7, image(112, 84), 9), **SETTINGS[form])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("form", ["all linear", "rank stabilised"])
def test_later_families(checkpoint: CheckpointMaker, tmp_path: Path, arch: str, form: str) -> None:
    folder = checkpoint(arch)
    compare(folder, tmp_path, qwen3_vl.prompt(folder, 7, qwen3_vl.image(96, 64), 9), **SETTINGS[form])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["qwen3_vl_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", **EXPERTS},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "rank_pattern": {"gate_up_proj": 3}},
    ],
    ids=["all", "one parameter", "a rank of its own"],
)
def test_experts(checkpoint: CheckpointMaker, tmp_path: Path, arch: str, settings: dict[str, Any]) -> None:
    folder = checkpoint(arch)
    compare(folder, tmp_path, prompt(40), **settings)
