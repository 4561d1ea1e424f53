"""Values of the JSON files are read, never assumed; nonsense is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError, ConfigError
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.loading import load_encoder, load_model
from dashinfer_vlm.models.registry import FAMILIES, family_of
from tests.conftest import CheckpointMaker

FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
ABSENT = object()


@pytest.fixture
def folder(checkpoint: CheckpointMaker, tmp_path: Path) -> Path:
    """The JSON files of a Qwen2.5-VL checkpoint, to be changed."""
    for name in FILES:
        shutil.copy(checkpoint("qwen2_5_vl") / name, tmp_path)
    return tmp_path


def change(folder: Path, key: str, value: Any, file: str = "config.json") -> None:
    """Set `outer.inner` of a JSON file, or remove it."""
    values = json.loads((folder / file).read_text())
    inner = values
    *outer, last = key.split(".")
    for part in outer:
        inner = inner[part]
    if value is ABSENT:
        inner.pop(last, None)
    else:
        inner[last] = value
    (folder / file).write_text(json.dumps(values))


@pytest.mark.parametrize("file", FILES[:2])
def test_what_is_nested_too_deep_is_told_so(folder: Path, file: str) -> None:
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read: it is nested too deep"):
        read_config(folder)


def test_sizes_are_those_of_the_files(folder: Path) -> None:
    config = read_config(folder)
    assert config.architecture == "Qwen2_5_VLForConditionalGeneration"
    assert (config.text.hidden_size, config.text.num_heads, config.text.num_kv_heads) == (128, 4, 2)
    assert (config.text.head_dim, config.text.rope.sections, config.text.rope.theta) == (32, (4, 6, 6), 1e6)
    assert config.vision is not None
    assert (config.vision.depth, config.vision.num_heads, config.vision.patch_dim) == (3, 4, 1176)
    assert (config.dtype, config.text.tie_word_embeddings, config.vision.rope_theta) == ("float32", True, 1e4)


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"rope_theta": 5000.0}, "text.rope.theta", 5000.0),
        ({"rms_norm_eps": 1e-5}, "text.rms_norm_eps", 1e-5),
        ({"rope_scaling.mrope_section": [2, 7, 7]}, "text.rope.sections", (2, 7, 7)),
        ({"tie_word_embeddings": False}, "text.tie_word_embeddings", False),
        ({"head_dim": 64, "rope_scaling.mrope_section": [8, 12, 12]}, "text.head_dim", 64),
        ({"vision_config.in_channels": ABSENT, "vision_config.in_chans": 3}, "vision.in_channels", 3),
        ({"torch_dtype": ABSENT, "dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"rope_scaling": ABSENT, "rope_theta": ABSENT,
          "rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "mrope_section": [4, 6, 6]}},
         "text.rope.theta", 70.0),
    ],
)  # fmt: skip
def test_a_changed_value_is_read(folder: Path, changes: dict[str, Any], attribute: str, value: object) -> None:
    for key, new in changes.items():
        change(folder, key, new)
    found: Any = read_config(folder)
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([1, 2], 3, (1, 2)), (1, 3, (1,)), (ABSENT, 3, (3,)), (ABSENT, [3, 4], (3, 4))],
)
def test_end_tokens_come_from_the_generation_config_first(
    folder: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    change(folder, "eos_token_id", generation, "generation_config.json")
    change(folder, "eos_token_id", config)
    assert read_config(folder).eos_token_ids == expected
    (folder / "generation_config.json").unlink()
    if generation is ABSENT:
        assert read_config(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", ABSENT),
        ("hidden_size", "128"),
        ("hidden_size", 130),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("vocab_size", -1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_scaling", ABSENT),
        ("rope_scaling", "mrope"),
        ("rope_scaling.type", "yarn"),
        ("rope_scaling.mrope_section", [4, 6]),
        ("rope_scaling.mrope_section", [4, 6, 7]),
        ("rope_scaling.mrope_section", ["4", 6, 6]),
        ("tie_word_embeddings", "yes"),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("torch_dtype", "int8"),
        ("architectures", []),
        ("architectures", "Qwen2_5_VLForConditionalGeneration"),
        ("quantization_config", {"bits": 4}),
        ("vision_config", ABSENT),
        ("vision_config.depth", 0),
        ("vision_config.num_heads", True),
        ("vision_config.patch_size", 16),
        ("vision_config.spatial_merge_size", 3),
        ("vision_config.temporal_patch_size", 1),
        ("vision_config.in_channels", 1),
    ],
)
def test_nonsense_is_named_with_its_key(folder: Path, key: str, value: object) -> None:
    change(folder, key, value)
    with pytest.raises(CheckpointError, match=key.rpartition(".")[2]):
        read_config(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens_per_second", 0),
        ("window_size", 13),
        ("hidden_act", "gelu"),
        ("fullatt_block_indexes", [3]),
        ("fullatt_block_indexes", "all"),
        ("hidden_size", ABSENT),
        ("out_hidden_size", 64),
        ("num_heads", 5),
        ("intermediate_size", 1.5),
    ],
)
def test_nonsense_of_the_vit_is_named_with_its_key(
    folder: Path, checkpoint: CheckpointMaker, key: str, value: object
) -> None:
    (folder / "model.safetensors").symlink_to(checkpoint("qwen2_5_vl") / "model.safetensors")
    change(folder, f"vision_config.{key}", value)
    with pytest.raises(CheckpointError, match=key):
        load_model(EngineConfig(model=str(folder), device="cpu"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_json_is_named(folder: Path, file: str) -> None:
    (folder / file).write_text("{")
    with pytest.raises(CheckpointError, match=file):
        read_config(folder)


def test_a_missing_folder_and_a_missing_config_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="gone is not a folder"):
        read_config(folder / "gone")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_config(folder)


def test_an_end_token_must_be_known(folder: Path) -> None:
    for file in FILES[:2]:
        change(folder, "eos_token_id", ABSENT, file)
    with pytest.raises(CheckpointError, match="eos_token_id is missing"):
        read_config(folder)


@pytest.mark.parametrize("ids", [10**6, [1, 10**6]])
def test_ends_of_text_are_ids_of_the_vocabulary(folder: Path, ids: object) -> None:
    change(folder, "eos_token_id", ids, "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is \[.*; ids are from 0 to "):
        read_config(folder)


def test_an_unknown_architecture_comes_with_the_supported_ones() -> None:
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is not supported; supported: Qwen2VLFor"):
        family_of("LlamaForCausalLM")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_architecture_leads_to_its_family(architecture: str) -> None:
    assert type(family_of(architecture)).__name__ == FAMILIES[architecture][1]


def test_a_missing_card_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        load_model(EngineConfig(model=str(folder), device="cuda"))


def test_a_worker_on_the_second_card_stays_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events would be those of the first card otherwise, where nothing happens."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(CheckpointError, match="safetensors"):
        load_encoder(EngineConfig(model=str(folder), vision_workers=1, vision_device="cuda:1"))
    assert chosen == [torch.device("cuda:1")]
