"""Mixtures of experts against `transformers`, in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers.backend import choose_backend
from dashinfer_vlm.layers.ranks import Ranks
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.experts import ExpertMlp
from dashinfer_vlm.models.family import VisionFamily
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import driving, qwen3_vl
from tests.models.driving import Driver, Prompt, greedy, hf_logits


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_next"])
def folder(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Path:
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def cases(folder: Path, hf: Any) -> list[Prompt]:
    if hf.config.model_type in ("qwen3_moe", "qwen3_next"):
        return [driving.prompt(70), driving.prompt(23, seed=1)]
    # what pictures do is compared in test_qwen3_vl.py; experts see rows
    return [qwen3_vl.prompt(folder, *qwen3_vl.CASES[name]) for name in ("text only", "videos and images mixed")]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_equal_those_of_transformers_in_chunks_of_any_size(
    model: Model, hf: Any, cases: list[Prompt], chunk: int
) -> None:
    driver = Driver(model)
    for case in cases:
        assert_close(driver.run(driver.start(case), chunk), hf_logits(hf, case))


def test_a_batch_of_sequences_gives_each_the_logits_it_has_alone(model: Model, hf: Any, cases: list[Prompt]) -> None:
    driver = Driver(model)
    lives = [driver.start(each) for each in cases]
    first = driver.step([(life, 3 + 2 * i) for i, life in enumerate(lives)])
    rest = driver.step([(life, len(life.ids) - life.num_done) for life in lives])
    for each, before, after in zip(cases, first, rest, strict=True):
        assert_close(torch.cat([before, after]), hf_logits(hf, each))


def test_64_greedy_tokens_equal_those_of_transformers(model: Model, hf: Any, cases: list[Prompt]) -> None:
    case = cases[0]
    with torch.no_grad():
        theirs = hf.generate(**case.hf_inputs(), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert greedy(Driver(model), case, 64, forbidden=model.eos_token_ids) == theirs[0, len(case.ids) :].tolist()


def test_experts_that_transformers_saved_in_its_own_order_give_the_same_logits(
    checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """`gate_up_proj` as [E, 2I, H] instead of the published [E, H, 2I]."""
    folder, case = checkpoint("qwen3_vl_moe"), driving.prompt(30)
    expected = Driver(driving.load(folder))
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    turned = {name: x.transpose(1, 2).contiguous() if ".experts." in name else x for name, x in tensors.items()}
    save_file(turned, tmp_path / "model.safetensors")
    ours = Driver(driving.load(tmp_path))
    assert torch.equal(ours.run(ours.start(case)), expected.run(expected.start(case)))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("gate_up_proj", (8, 128, 190), "are no experts'"),
        ("gate_up_proj", (7, 128, 192), "are no experts'"),
        ("down_proj", None, "down_proj is missing"),
    ],
    ids=["channels", "count", "half of them"],
)
def test_experts_that_do_not_fit_are_named(
    checkpoint: CheckpointMaker, tmp_path: Path, kind: str, shape: tuple[int, ...] | None, message: str
) -> None:
    folder = checkpoint("qwen3_vl_moe")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.language_model.layers.1.mlp.experts.{kind}"
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Weights(tmp_path, VisionFamily.names, None)


@pytest.mark.parametrize(
    ("arch", "values", "message"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; there are 8 experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("qwen3_moe", {"intermediate_size": None}, "intermediate_size is missing"),
        ("qwen3_vl_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_5_moe", {"mlp_only_layers": [0]}, "intermediate_size is missing"),
        (
            "qwen3_5_moe",
            {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size is 64; supported: 96",
        ),
        ("qwen3_5_moe", {"layer_types": ["linear_attention"] * 4}, "layer_types names linear_attention alone"),
    ],
)
def test_nonsense_is_named_with_its_key(
    checkpoint: CheckpointMaker, tmp_path: Path, arch: str, values: dict[str, Any], message: str
) -> None:
    folder = checkpoint(arch)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    changed = config | values if arch == "qwen3_moe" else config | {"text_config": config["text_config"] | values}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_which_layers_have_experts(checkpoint: CheckpointMaker) -> None:
    archs = ("qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_next", "qwen3", "qwen3_5")
    mixtures = [read_config(checkpoint(arch)).text.mixture for arch in archs]
    layers = [mixture and sorted(mixture.layers) for mixture in mixtures]
    assert layers == [[1], *2 * [[0, 1, 2, 3]], [1, 2, 3], None, None]
    assert [mixture and mixture.has_shared for mixture in mixtures] == [False, False, True, True, None, None]


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
@pytest.mark.parametrize(
    ("arch", "options", "most"),
    [
        ("qwen3_moe", {}, 0.02),
        ("qwen3_moe", {"quant_type": "a8w8"}, 0.06),
        ("qwen3_moe", {"quant_type": "a16w8"}, 0.04),
        ("qwen3_moe", {"quant_type": "a16w4"}, 0.4),
        ("qwen3_5_moe", {"quant_type": "a8w8"}, 0.15),  # states remember an expert that was chosen otherwise
        ("qwen3_5_moe", {"quant_type": "a16w4"}, 0.6),
        ("qwen3_next", {"quant_type": "a8w8"}, 0.15),
        ("qwen3_next", {"quant_type": "a16w4"}, 0.6),
    ],
    ids=str,
)
def test_rounded_weights_stay_near_the_stored_ones(
    checkpoint: CheckpointMaker, arch: str, options: dict[str, str], most: float
) -> None:
    model, case = str(checkpoint(arch, size="small")), driving.prompt(40)
    exact, ours = (
        Driver(load_model(EngineConfig(model=model, device="cpu", quant_cache_gib=0, dtype=dtype, **more)))  # type: ignore[arg-type]
        for dtype, more in (("float32", {}), ("bfloat16", options))
    )
    want = exact.run(exact.start(case))
    error = (ours.run(ours.start(case)) - want).norm() / want.norm()
    assert 0 < error < most


def test_the_parts_of_two_ranks_add_up(checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(checkpoint("qwen3_moe"))
    backend = choose_backend(torch.device("cpu"), torch.float32)
    x, residual = torch.randn(5, 128), torch.randn(5, 128)
    monkeypatch.setattr(Ranks, "sum", lambda ranks, part: part)

    def made(ranks: Ranks) -> torch.Tensor:
        weights = Weights(config.folder, config.family.names, None)
        experts = ExpertMlp("model.layers.1.mlp", config.text, weights, replace(backend, ranks=ranks))
        return experts(x, residual=residual.clone())

    torch.testing.assert_close(made(Ranks(0, 2)) + made(Ranks(1, 2)), made(Ranks()))


@pytest.mark.parametrize("arch", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_the_transformers_tower_agrees_with_ours(checkpoint: CheckpointMaker, arch: str) -> None:
    """There is a class of it for each architecture."""
    folder, grid = checkpoint(arch), (1, 8, 12)
    patches = torch.randint(0, 256, (96, 1536), dtype=torch.uint8)
    towers = (driving.load(folder, vision_engine=engine) for engine in ("native", "transformers"))
    (ours,), (theirs,) = (driving.run_vit(tower, [patches], [grid]) for tower in towers)
    assert_close(ours, theirs)
