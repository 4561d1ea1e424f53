"""Fine-tunes that are a supported architecture under another name: their configurations are read.

`finetunes.json` was written from memory of the published files and of their base models; no weights are tried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.config import read_config

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "finetunes.json").read_text())
QWEN2 = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
QWEN3 = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write(folder: Path, config: dict[str, Any]) -> Path:
    is_qwen3 = config["architectures"][0].startswith("Qwen3")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN3 if is_qwen3 else QWEN2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    return folder


@pytest.mark.parametrize(
    ("name", "family", "hidden_size", "head_dim", "columns"),
    [
        ("allenai/olmOCR-7B-0225-preview", "Qwen2VL", 3584, 128, 1),
        ("allenai/olmOCR-2-7B-1025", "Qwen25VL", 3584, 128, 1),
        ("XiaomiMiMo/MiMo-VL-7B-RL", "Qwen25VL", 4096, 128, 1),
        ("opendatalab/MinerU2.5-2509-1.2B", "Qwen2VL", 896, 64, 1),
        ("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "Qwen2VL", 1536, 128, 1),
        ("Qwen/QVQ-72B-Preview", "Qwen2VL", 8192, 128, 1),
        ("Qwen/Qwen3-VL-Embedding-2B", "Qwen3VL", 2048, 128, 4),
    ],
)
def test_its_configuration_is_read(
    tmp_path: Path, name: str, family: str, hidden_size: int, head_dim: int, columns: int
) -> None:
    config = read_config(write(tmp_path, CONFIGS[name]))
    assert type(config.family).__name__ == family
    assert (config.text.hidden_size, config.text.head_dim) == (hidden_size, head_dim)
    assert config.embedding_size == columns * hidden_size
    assert config.placeholder_ids == {"image": 151655, "video": 151656}
    assert sum(config.text.rope.sections) == head_dim // 2


def test_every_configuration_is_tried() -> None:
    assert len(CONFIGS) == 7


def test_an_architecture_of_its_own_is_told_by_name(tmp_path: Path) -> None:
    config = CONFIGS["opendatalab/MinerU2.5-2509-1.2B"] | {"architectures": ["Mineru2QwenForCausalLM"]}
    with pytest.raises(CheckpointError, match="Mineru2QwenForCausalLM is not supported; supported: Qwen2VLFor"):
        read_config(write(tmp_path, config))


def test_attention_without_interleaved_axes_is_told_by_name(tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIGS["Qwen/Qwen3-VL-Embedding-2B"]))
    config["text_config"]["rope_scaling"]["mrope_interleaved"] = False
    with pytest.raises(CheckpointError, match="mrope_interleaved is False; this architecture is supported with True"):
        read_config(write(tmp_path, config))
