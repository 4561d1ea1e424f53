"""What Qwen3.5 alone has, against `transformers`: layers in any order, gates, heads that turn in part; and what is
refused. The rest is compared in `test_qwen3_vl.py`, and with experts in `test_experts.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.config import CheckpointConfig, MixtureConfig, read_config
from dashinfer_vlm.models.footprint import kv_token_bytes
from dashinfer_vlm.models.loading import allocate_kv, load_model
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.driving import Driver, greedy, hf_logits
from tests.models.qwen3_vl import image, prompt

LINEAR, FULL = "linear_attention", "full_attention"


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_5")


def change_text(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def random_weights(folder: Path) -> None:
    """In place of the folder's, for what its configuration says now; as `transformers` writes them."""
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight += torch.randn_like(weight) * 0.1 - 4 * name.endswith("A_log")
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 3, "layer_types": [FULL, LINEAR, LINEAR]},
        {
            "full_attention_interval": 2,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "num_key_value_heads": 1,
        },
        {"linear_conv_kernel_dim": 3, "linear_num_key_heads": 4, "tie_word_embeddings": False},
    ],
    ids=["states last", "three heads share keys", "a shorter convolution"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_shapes_give_the_logits_of_transformers(changed: Path, values: dict[str, Any]) -> None:
    change_text(changed, **values)
    random_weights(changed)
    case = prompt(changed, 30, image(96, 64), 60)
    model, hf = driving.load(changed), driving.load_hf(changed)
    for chunk in (1000, 31):
        driver = Driver(model)
        logits = driver.run(driver.start(case), chunk)
        torch.testing.assert_close(logits, hf_logits(hf, case), atol=1e-4, rtol=0)


@pytest.mark.parametrize("yarn", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}])
@pytest.mark.parametrize("arch", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_text_models_give_the_logits_and_tokens_of_transformers(
    checkpoint: CheckpointMaker, tmp_path: Path, arch: str, yarn: dict[str, Any]
) -> None:
    """Which saves the sections of the axes with them; they turn alike."""
    folder, case = checkpoint(arch), driving.prompt(50)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= yarn
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, hf = driving.load(tmp_path), driving.load_hf(tmp_path)
    for chunk in (1000, 7):
        driver = Driver(model)
        torch.testing.assert_close(driver.run(driver.start(case), chunk), hf_logits(hf, case), atol=1e-4, rtol=0)
    with torch.no_grad():
        theirs = hf.generate(**case.hf_inputs(), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert greedy(Driver(model), case, 64, forbidden=model.eos_token_ids) == theirs[0, len(case.ids) :].tolist()


def test_tensors_of_a_text_model_may_be_called_as_those_of_one_that_sees(
    checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder, case = checkpoint("qwen3_5_text"), driving.prompt(20)
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model."): x for name, x in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    ours, theirs = (Driver(driving.load(each)) for each in (tmp_path, folder))
    assert torch.equal(ours.run(ours.start(case)), theirs.run(theirs.start(case)))


@pytest.mark.parametrize("arch", ["qwen3_5", "qwen3_5_moe"])
def test_the_head_for_drafts_is_left_out(checkpoint: CheckpointMaker, tmp_path: Path, arch: str) -> None:
    """Also when its layer has experts, which are no matter of ours."""
    folder = checkpoint(arch)
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    drafts = {name: torch.zeros(2, 2) for name in ("mtp.fc.weight", "mtp.layers.0.mlp.experts.gate_up_proj")}
    save_file(load_file(folder / "model.safetensors") | drafts, tmp_path / "model.safetensors")
    names = read_config(tmp_path).family.names
    assert Weights(tmp_path, names, None).num_bytes == Weights(folder, names, None).num_bytes
    load_model(EngineConfig(model=str(tmp_path), dtype="float32", device="cpu"))


def test_states_begin_with_zeros_whoever_had_the_seat(folder: Path) -> None:
    driver = Driver(driving.load(folder))
    case = prompt(folder, 20)
    first, second = driver.start(case), driver.start(case)
    second.seat = first.seat
    assert torch.equal(driver.run(first), driver.run(second))


def test_keys_and_values_of_8_bits_stay_near(folder: Path) -> None:
    model, case = driving.load(folder), prompt(folder, 40, image(64, 64), 20)
    exact, rounded = (Driver(model, kv_dtype=dtype) for dtype in (None, torch.int8))
    logits = exact.run(exact.start(case))
    assert 0 < float((rounded.run(rounded.start(case)) - logits).norm() / logits.norm()) < 0.02


def test_caches_are_those_of_the_layers_that_have_them(folder: Path) -> None:
    text, kv = read_config(folder).text, allocate_kv(driving.load(folder), 3, 16, num_seats=5)
    assert text.delta_net is not None
    assert (len(kv.keys), [len(state) for state in kv.states], kv.num_seats) == (1, [3, 3], 5)
    kept = [state.nbytes for state in kv.states]
    assert sum(kept) == 5 * text.delta_net.state_bytes
    assert kv.num_bytes == sum(kept) + 3 * 16 * kv_token_bytes(text, torch.float32)


def read_published(folder: Path, architecture: str, **values: Any) -> CheckpointConfig:
    """The configuration of the 27B models, from memory, with other values of the text model."""
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    text = {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "full_attention_interval": 4,
        "layer_types": 16 * [LINEAR, LINEAR, LINEAR, FULL],
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "partial_rotary_factor": 0.25,
        "rope_parameters": rope | {"partial_rotary_factor": 0.25},
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "vocab_size": 248320,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        **values,
    }
    vision = {
        "model_type": "qwen3_5",
        "deepstack_visual_indexes": [],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": [architecture],
        "model_type": "qwen3_5",
        "language_model_only": False,
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }
    processor = {"patch_size": 16, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return read_config(folder)


def test_a_configuration_as_published_is_read(tmp_path: Path) -> None:
    """That of the 27B models: 3 MiB of memories and 120 KiB of inputs in each of 48 layers."""
    read = read_published(tmp_path, "Qwen3_5ForConditionalGeneration")
    assert read.text.num_kv_layers == 16
    assert read.text.state_bytes == 48 * ((3 << 20) + (120 << 10))
    assert kv_token_bytes(read.text, torch.bfloat16) == 64 << 10
    assert read.text.rope.sections == (11, 11, 10)
    assert read.embedding_size == 5120


def test_a_mixture_as_published_is_read(tmp_path: Path) -> None:
    """Qwen3.5-35B-A3B's: 2 MiB of memories and 96 KiB of inputs in each of 30 layers; none has an MLP."""
    read = read_published(
        tmp_path,
        "Qwen3_5MoeForConditionalGeneration",
        model_type="qwen3_5_moe_text",
        hidden_size=2048,
        intermediate_size=None,
        layer_types=10 * [LINEAR, LINEAR, LINEAR, FULL],
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        linear_num_value_heads=32,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        mlp_only_layers=[],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    assert read.text.mixture == MixtureConfig(
        num_experts=256,
        num_chosen=8,
        intermediate_size=512,
        is_normalised=True,
        layers=frozenset(range(40)),
        has_shared=True,
    )
    assert read.text.state_bytes == 30 * ((2 << 20) + (96 << 10))
    assert kv_token_bytes(read.text, torch.bfloat16) == 20 << 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate is false"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"layer_types": [LINEAR] * 4}, "layer_types names linear_attention alone"),
        ({"layer_types": [LINEAR, FULL]}, "must name each of 4 layers linear_attention or full_attention"),
        ({"layer_types": [LINEAR, FULL, "sliding", FULL]}, "must name each of 4 layers"),
        ({"full_attention_interval": 9}, "layer_types names linear_attention alone"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads is 3, no multiple of linear_num_key_heads 2"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim is missing"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it must be a whole number of at least 2"),
        (
            {"rope_parameters": {"rope_theta": 1e7, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; this architecture is supported with 0.25",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e7, "mrope_section": [16, 8, 8]}},
            r"mrope_section is \[16, 8, 8\]; three numbers must add up to 8",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_told_by_name(changed: Path, values: dict[str, Any], message: str) -> None:
    change_text(changed, **values)
    with pytest.raises(CheckpointError, match=message):
        read_config(changed)


def test_deepstack_is_told_by_name(changed: Path) -> None:
    config = json.loads((changed / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = [1]
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"deepstack_visual_indexes is \[1\]; .* is supported without"):
        read_config(changed)
