"""Adapters that would change the model in another way than is done here, or that do not fit, are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.loading import check_checkpoint, load_model
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.adapters import Adapter, old_name


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen2_5_vl")


def config(folder: Path, lora: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), lora=str(lora), dtype="float32", device="cpu")


def of_text(module: str) -> bool:
    return "visual" not in module


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; supported: LORA"),
    "DoRA": ({"use_dora": True}, "use_dora is True; adapters are supported without"),
    "biases": ({"bias": "all"}, "bias is 'all'; supported: none"),
    "biases of B": ({"lora_bias": True}, "lora_bias is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "single words": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "tokens that switch it on": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "something new": ({"use_something_new": {"a": 1}}, "use_something_new"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', which changes the model's own weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "'olora', which changes"),
    "CorDA": ({"init_lora_weights": "corda"}, "'corda', which changes"),
    "no rank": ({"r": None}, "r is missing"),
    "a rank of nothing": ({"r": 0}, "r is 0"),
    "a scale that is none": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "a scale beyond 32 bits": ({"lora_alpha": 1e39}, r"lora_alpha is 1e\+39; it must be a number above 0"),
    "a scale beyond all floats": ({"lora_alpha": 10**400}, "lora_alpha is 10{400}; it must be a number above 0"),
    "another rank": ({"r": 5}, r"shape \[4, \d+\], not \[5, \d+\], which rank 5 gives a weight of"),
    "a huge rank": ({"r": 10**18}, "which rank 1000000000000000000 gives a weight of"),
    "a pattern of nothing": ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern: q_proj is 'x'"),
    "a regular expression": ({"rank_pattern": {"(a+)+$": 4}}, r"rank_pattern: \(a\+\)\+\$ is a regular expression"),
    "alphas of expressions": ({"alpha_pattern": {"q.proj|k": 4}}, r"alpha_pattern: q.proj\|k is a regular expression"),
    "patterns that are none": ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it must be an object"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_are_not_served_are_refused_by_name(folder: Path, tmp_path: Path, what: str) -> None:
    settings, message = REFUSED[what]
    lora = Adapter(driving.load_hf(folder), of_text).write(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(config(folder, lora))


@pytest.mark.parametrize("kind", [None, True, False, "gaussian", "eva", "orthogonal"])
def test_training_may_begin_anywhere_that_leaves_the_model_alone(folder: Path, tmp_path: Path, kind: object) -> None:
    converted: dict[str, Any] = {
        "corda_config": {"corda_method": "ipm"},
        "lora_ga_config": {"scale": "stable"},
        "eva_config": {"rho": 2.0},
    }
    lora = Adapter(driving.load_hf(folder), of_text).write(tmp_path, init_lora_weights=kind, **converted)
    check_checkpoint(config(folder, lora))


def test_an_adapter_of_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    lora = Adapter(driving.load_hf(folder), of_text).write(tmp_path)
    save_file({}, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors holds no tensors"):
        check_checkpoint(config(folder, lora))


@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 3e38), ("bfloat16", 3e38), ("float16", 1e9)])
def test_sums_beyond_what_a_weight_holds_are_refused(folder: Path, tmp_path: Path, dtype: Any, alpha: float) -> None:
    lora = Adapter(driving.load_hf(folder), of_text).write(tmp_path, lora_alpha=alpha)
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({name: 100 * x for name, x in tensors.items()}, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"adds numbers beyond what {dtype} holds"):
        load_model(EngineConfig(model=str(folder), lora=str(lora), dtype=dtype, device="cpu"))


Q, B = "base_model.model.model.language_model.layers.0.self_attn.q_proj.", "lora_B.weight"
ONE = torch.ones(1)
TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "half a pair": ({Q + B: None}, r"q_proj.lora_A.weight has no other half"),
    "another size": ({Q + B: torch.ones(5, 4)}, r"q_proj.lora_B.weight has shape \[5, 4\], not \[\d+, 4\]"),
    "one axis": ({Q + B: torch.ones(4)}, r"q_proj.lora_B.weight has shape \[4\]"),
    "whole numbers": ({Q + B: torch.ones(4, 4, dtype=torch.int32)}, "q_proj.lora_B.weight is I32; supported: BF16"),
    "magnitudes": ({Q + "lora_magnitude_vector.weight": ONE}, "lora_magnitude_vector.weight is no part of a LoRA"),
    "an embedding": ({"base_model.model.x.lora_embedding_A": ONE}, "x.lora_embedding_A is no part of a LoRA"),
    "a whole tensor": ({"base_model.model.lm_head.weight": ONE}, "lm_head.weight is no part of a LoRA"),
    "another's name": ({"lora_unet_x.weight": ONE}, "lora_unet_x.weight is no part of a LoRA"),
    "no such layer": (
        {f"base_model.model.model.layers.99.x.lora_{half}.weight": torch.ones(4, 4) for half in "AB"},
        "the model has no place for tensor base_model.model.model.layers.99.x.lora_A.weight",
    ),
    "a norm": (
        {f"base_model.model.model.norm.lora_{half}.weight": torch.ones(4, 4) for half in "AB"},
        "the model has no place for tensor base_model.model.model.norm.lora_A.weight",
    ),
    "a head that is the embedding": (
        {f"base_model.model.lm_head.lora_{half}.weight": torch.ones(4, 4) for half in "AB"},
        "the model has no place for tensor base_model.model.lm_head.lora_A.weight",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_used_are_refused_by_name(checkpoint: CheckpointMaker, tmp_path: Path, what: str) -> None:
    changes, message = TENSORS[what]
    folder = checkpoint("qwen2_vl")
    adapter = Adapter(driving.load_hf(folder), of_text)
    lora = adapter.write(tmp_path)
    tensors = {name: tensor for name, tensor in (adapter.tensors() | changes).items() if tensor is not None}
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(config(folder, lora))


def test_a_matrix_has_one_update(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter(driving.load_hf(folder), of_text)
    lora = adapter.write(tmp_path)
    again = {name: tensor.clone() for name, tensor in adapter.tensors(old_name).items()}
    save_file(adapter.tensors() | again, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adds to model\.layers\.\d+.*, as another one does"):
        check_checkpoint(config(folder, lora))


@pytest.mark.parametrize("shape", [(8 * 4, 7), (7 * 4, 128), (5,)])
def test_experts_of_other_shapes_are_refused(
    checkpoint: CheckpointMaker, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    folder = checkpoint("qwen3_moe")
    adapter = Adapter(driving.load_hf(folder), lambda module: module.endswith(".experts"))
    lora, tensors = adapter.write(tmp_path), adapter.tensors()
    name = next(iter(tensors))
    save_file(tensors | {name: torch.ones(shape)}, lora / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"experts.lora_A.weight has shape .*, which fit no matrices of 8 experts"
    ):
        check_checkpoint(config(folder, lora))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder: Path, tmp_path: Path, number: float) -> None:
    adapter = Adapter(driving.load_hf(folder), of_text)
    lora, tensors = adapter.write(tmp_path), adapter.tensors()
    tensors[Q + B][1, 2] = number
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.lora_B.weight holds numbers that are not finite"):
        load_model(config(folder, lora))


def no_folder(lora: Path) -> None:
    shutil.rmtree(lora)


def no_settings(lora: Path) -> None:
    (lora / "adapter_config.json").unlink()


def a_pickle(lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")


def nothing(lora: Path) -> None:
    (lora / "adapter_model.safetensors").unlink()


def cut_off(lora: Path) -> None:
    whole = (lora / "adapter_model.safetensors").read_bytes()
    (lora / "adapter_model.safetensors").write_bytes(whole[:-5])


def weights_beside_it(lora: Path) -> None:
    save_file({"x": ONE}, lora / "vit.safetensors")


def no_json(lora: Path) -> None:
    (lora / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "holds no adapter_config.json; --lora takes an adapter that PEFT wrote"),
        (no_settings, "holds no adapter_config.json; --lora takes an adapter that PEFT wrote"),
        (a_pickle, "holds no adapter_model.safetensors; adapter_model.bin may hold code and is not read"),
        (nothing, "holds no adapter_model.safetensors$"),
        (cut_off, "adapter_model.safetensors is damaged or cut off"),
        (weights_beside_it, "holds vit.safetensors, which is no part of a LoRA adapter"),
        (no_json, "adapter_config.json cannot be read"),
    ],
)
def test_folders_that_are_no_adapters_are_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    lora = Adapter(driving.load_hf(folder), of_text).write(tmp_path / "adapter")
    damage(lora)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(config(folder, lora))


def test_what_is_left_of_a_checkpoint_is_still_found(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model.safetensors").unlink()
    save_file(load_file(folder / "model.safetensors") | {"model.more": ONE}, tmp_path / "model.safetensors")
    lora = Adapter(driving.load_hf(folder), of_text).write(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"the model has no place for tensor model\.more"):
        check_checkpoint(config(tmp_path, lora))
