"""What Qwen3-Next alone has, against `transformers`: projections that lie together for each key head. The rest is
compared in `test_experts.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from dashinfer_vlm.errors import CheckpointError, ConfigError
from dashinfer_vlm.layers.linear import Matrix
from dashinfer_vlm.layers.ranks import ALONE, Ranks
from dashinfer_vlm.models import entries, weights
from dashinfer_vlm.models.config import CheckpointConfig, MixtureConfig, read_config
from dashinfer_vlm.models.delta_net import Heads, InterleavedDeltaNet
from dashinfer_vlm.models.footprint import kv_token_bytes
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.driving import Driver, greedy, hf_logits
from tests.models.test_stored import BLOCKS, by_blocks, write_pair

LINEAR, FULL = "linear_attention", "full_attention"
LAYER = "model.layers.0.linear_attn"
CASE = driving.prompt(50)


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3_next")


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def random_weights(folder: Path) -> None:
    """In place of the folder's, for what its configuration says now; as `transformers` writes them."""
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight += torch.randn_like(weight) * 0.1 - 4 * name.endswith("A_log")
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 3, "layer_types": [FULL, LINEAR, LINEAR], "mlp_only_layers": []},
        {"full_attention_interval": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 3},
        {"linear_num_key_heads": 4, "linear_value_head_dim": 16, "norm_topk_prob": False},
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
    ids=["states last", "three heads share keys", "a head for each key", "more MLPs", "yarn"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_shapes_give_the_logits_of_transformers(changed: Path, values: dict[str, Any]) -> None:
    change(changed, **values)
    random_weights(changed)
    model, hf = driving.load(changed), driving.load_hf(changed)
    for chunk in (1000, 31):
        driver = Driver(model)
        torch.testing.assert_close(driver.run(driver.start(CASE), chunk), hf_logits(hf, CASE), atol=1e-4, rtol=0)


def projections(folder: Path, ranks: Ranks = ALONE) -> tuple[Matrix, torch.Tensor]:
    config = read_config(folder)
    text, source = config.text, Weights(folder, config.family.names, config.stored)
    assert text.delta_net is not None
    heads = Heads.of(text.delta_net, ranks)
    return InterleavedDeltaNet.projections(LAYER, text.delta_net, text.hidden_size, heads, source)


@pytest.mark.parametrize("count", [1, 2])
def test_projections_of_all_ranks_are_what_transformers_makes_of_them(folder: Path, count: int) -> None:
    """Numbered rows say where each has gone."""
    layer = Qwen3NextGatedDeltaNet(AutoConfig.from_pretrained(folder), 0)
    tensors = load_file(folder / "model.safetensors")
    qkvz, ba = (tensors[f"{LAYER}.in_proj_{name}.weight"] for name in ("qkvz", "ba"))
    numbered = (torch.arange(float(len(x)))[None, None] for x in (qkvz, ba))
    theirs = [x.flatten().long() for x in layer.fix_query_key_value_ordering(*numbered)]
    for rank in range(count):
        joined, rates = projections(folder, Ranks(rank, count))
        want = [x.chunk(count)[rank] for x in theirs]
        assert joined.num_rows == sum(map(len, want[:4]))
        assert torch.equal(joined.read(), qkvz[torch.cat(want[:4])])
        assert torch.equal(rates, ba[torch.cat(want[4:])])


def test_heads_that_cannot_be_dealt_out_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--parallel-size 4 does not divide the model's 2 key heads of gated delta"):
        projections(folder, Ranks(0, 4))


def test_a_matrix_is_read_once_however_many_parts_of_it_are_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def read_base(entry: entries.Entry) -> torch.Tensor:
        names.append(entry.name)
        return entries.read_base(entry)

    monkeypatch.setattr(weights, "read_base", read_base)
    projections(folder)[0].read()
    assert names == [f"{LAYER}.in_proj_qkvz.weight"]


@pytest.mark.filterwarnings("ignore")
def test_8_bit_floats_of_heads_as_wide_as_blocks_stay_what_they_are(changed: Path, tmp_path: Path) -> None:
    """As the published ones are; heads change places with their scales."""
    wide = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_hidden_layers": 2, "num_experts": 3}
    change(changed, **wide, layer_types=[LINEAR, FULL])
    random_weights(changed)
    (pair := tmp_path / "pair").mkdir()
    stored, written = (
        projections(each)[0] for each in write_pair(changed, pair, BLOCKS, ".weight_scale_inv", by_blocks(128, 128))
    )
    assert stored.read_floats is not None
    floats = stored.read_floats()
    assert torch.equal((floats.numbers.float() * floats.scales.repeat_interleave(128, 0)).bfloat16(), written.read())
    assert torch.equal(stored.read(), written.read())


def test_experts_may_lie_in_one_tensor(folder: Path, changed: Path) -> None:
    """As the model has them in `transformers`, and the head for drafts beside them is left out."""
    tensors = load_file(folder / "model.safetensors")
    for i in range(1, 4):
        prefix = f"model.layers.{i}.mlp.experts"
        gates, ups, downs = (
            torch.stack([tensors.pop(f"{prefix}.{j}.{kind}_proj.weight") for j in range(8)])
            for kind in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat((gates, ups), dim=1), f"{prefix}.down_proj": downs}
    tensors["mtp.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(2, 2)
    (changed / "model.safetensors").unlink()
    save_file(tensors, changed / "model.safetensors")
    ours, theirs = (Driver(driving.load(each)) for each in (changed, folder))
    assert torch.equal(ours.run(ours.start(CASE)), theirs.run(theirs.start(CASE)))


def test_a_bfloat16_checkpoint_gives_the_greedy_tokens_of_its_values_in_float32(checkpoint: CheckpointMaker) -> None:
    folder = checkpoint("qwen3_next", dtype="bfloat16")
    ours, reference = (Driver(driving.load(folder, dtype)) for dtype in ("bfloat16", "float32"))
    assert greedy(ours, CASE, 16) == greedy(reference, CASE, 16)


def read_published(folder: Path, **values: Any) -> CheckpointConfig:
    """The configuration of the 80B models, from memory."""
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        **values,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def test_a_configuration_as_published_is_read(tmp_path: Path) -> None:
    """2 MiB of memories and 96 KiB of inputs in each of 36 layers."""
    text = read_published(tmp_path).text
    assert text.mixture == MixtureConfig(
        num_experts=512,
        num_chosen=10,
        intermediate_size=512,
        is_normalised=True,
        layers=frozenset(range(48)),
        has_shared=True,
    )
    assert text.state_bytes == 36 * ((2 << 20) + (96 << 10))
    assert kv_token_bytes(text, torch.bfloat16) == 24 << 10
    assert (text.rope.sections, text.rope.theta, text.norm_offset) == ((32, 0, 0), 1e7, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts_per_tok": 513}, "num_experts_per_tok is 513; there are 512 experts"),
        ({"shared_expert_intermediate_size": 1024}, "shared_expert_intermediate_size is 1024; supported: 512"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this architecture is supported with 0.25"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads is 24, no multiple of linear_num_key_heads 16"),
        ({"layer_types": [LINEAR] * 48}, "layer_types names linear_attention alone"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type is 'llama3'; supported: default, yarn"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_told_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_published(tmp_path, **values)
