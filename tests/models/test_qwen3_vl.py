"""Qwen3-VL and Qwen3.5 against `transformers`, in float32: deepstack or states in place of keys and values, interleaved
M-RoPE, learnt positions, videos in several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.models import vit
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.models.vit_embed import PositionTable
from dashinfer_vlm.models.vit_layout import patch_positions
from dashinfer_vlm.request import Grid
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.driving import Driver, Prompt, greedy, hf_logits, run_vit
from tests.models.qwen3_vl import CASES, PROCESSOR, image, prompt


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def folder(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Path:
    return checkpoint(request.param)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, folder: Path) -> Prompt:
    return prompt(folder, *CASES[request.param])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_equal_those_of_transformers_in_chunks_of_any_size(
    model: Model, hf: Any, case: Prompt, chunk: int
) -> None:
    driver = Driver(model)
    assert_close(driver.run(driver.start(case), chunk), hf_logits(hf, case))


def test_a_batch_of_sequences_gives_each_the_logits_it_has_alone(model: Model, hf: Any, folder: Path) -> None:
    driver = Driver(model)
    prompts = [prompt(folder, *parts) for parts in CASES.values()]
    lives = [driver.start(each) for each in prompts]
    first = driver.step([(life, 3 + 2 * i) for i, life in enumerate(lives)])
    rest = driver.step([(life, len(life.ids) - life.num_done) for life in lives])
    for each, before, after in zip(prompts, first, rest, strict=True):
        assert_close(torch.cat([before, after]), hf_logits(hf, each))


@pytest.mark.parametrize("name", ["one image", "videos and images mixed"])
def test_64_greedy_tokens_equal_those_of_transformers(model: Model, hf: Any, folder: Path, name: str) -> None:
    each = prompt(folder, *CASES[name])
    inputs = {key: value for key, value in each.hf_inputs().items() if key != "second_per_grid_ts"}
    with torch.no_grad():
        theirs = hf.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert greedy(Driver(model), each, 64, forbidden=model.eos_token_ids) == theirs[0, len(each.ids) :].tolist()


def test_positions_are_golden(folder: Path, hf: Any, case: Prompt) -> None:
    config = read_config(folder)
    positions, offset = config.family.positions(config, len(case.ids), case.items)
    inputs = {"mm_token_type_ids": torch.zeros(1, len(case.ids), dtype=torch.int32)} | case.hf_inputs()
    expected, delta = hf.model.get_rope_index(**inputs)
    assert positions.tolist() == expected[:, 0].tolist()
    assert offset == int(delta)


def test_embeddings_are_the_merged_rows_and_those_of_deepstack(model: Model, folder: Path, hf: Any) -> None:
    grids = [(1, 8, 12), (2, 4, 6), (1, 2, 2), (1, 20, 18)]
    items = [random_patches(grid, seed) for seed, grid in enumerate(grids)]
    assert model.embedding_size == (4 if "qwen3_vl" in folder.name else 1) * model.text.hidden_size
    for patches, grid, ours in zip(items, grids, run_vit(model, items, grids), strict=True):
        with torch.no_grad():
            theirs = hf.model.visual(driving.normalised(patches, PROCESSOR), torch.tensor([grid]))
        assert_close(ours, torch.cat([theirs.pooler_output, *getattr(theirs, "deepstack_features", ())], dim=1))


def test_the_transformers_tower_agrees_with_ours(model: Model, folder: Path) -> None:
    tower = driving.load(folder, vision_engine="transformers")
    grids = [(1, 8, 12), (2, 4, 6)]
    items = [random_patches(grid, seed) for seed, grid in enumerate(grids)]
    for ours, theirs in zip(run_vit(model, items, grids), run_vit(tower, items, grids, 1), strict=True):
        assert_close(ours, theirs)


def test_the_smallest_slices_give_the_embeddings_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = [(1, 8, 12), (2, 4, 6), (1, 20, 18)]
    items = [random_patches(grid, seed) for seed, grid in enumerate(grids)]
    whole = run_vit(driving.load(folder), items, grids)
    monkeypatch.setattr(vit, "CPU_SLICE_FLOPS", 1.0)
    monkeypatch.setattr(vit, "MIN_SLICE_ROWS", 12)
    sliced = run_vit(driving.load(folder), items, grids, slices_at_once=1)
    for ours, theirs in zip(sliced, whole, strict=True):
        assert_close(ours, theirs)


def random_patches(grid: Grid, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (grid[0] * grid[1] * grid[2], 1536), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 8, 8), (2, 6, 14), (1, 40, 4)], ids=str)
def test_the_table_of_positions_is_stretched_as_in_transformers(grid: Grid) -> None:
    table = PositionTable.__new__(PositionTable)
    table.side, table.table = 8, torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    taps = table.taps([patch_positions(grid, 2)], [grid])
    x = torch.zeros(len(taps.indices), 5)
    table.add(x, taps, slice(None))
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), 8, "bilinear", align_corners=True, spatial_merge_size=2
    )
    torch.testing.assert_close(x, (table.table[indices] * weights[:, :, None]).sum(1))


def test_embeddings_of_the_hidden_size_add_nothing_to_later_layers(checkpoint: CheckpointMaker) -> None:
    folder = checkpoint("qwen3_vl")
    model, case = driving.load(folder), prompt(folder, 4, image(64, 64), 3)
    driver = Driver(model)
    logits = []
    for columns in (1, 4):
        life = driver.start(case)
        embedding = life.embeddings[0].clone()
        embedding[:, model.text.hidden_size :] = 0
        life.embeddings = [embedding[:, : columns * model.text.hidden_size]]
        logits.append(driver.run(life))
    assert torch.equal(*logits)


@pytest.mark.parametrize("arch", ["qwen3_vl", "qwen3_5"])
def test_a_bfloat16_checkpoint_gives_the_greedy_tokens_of_its_values_in_float32(
    checkpoint: CheckpointMaker, arch: str
) -> None:
    folder = checkpoint(arch, dtype="bfloat16")
    ours, reference = (Driver(driving.load(folder, dtype)) for dtype in ("bfloat16", "float32"))
    for seed in range(3):
        case = prompt(folder, 12, image(128, 128, seed), 10, seed=seed)
        assert greedy(ours, case, 16) == greedy(reference, case, 16)


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
@pytest.mark.parametrize("arch", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize(
    ("options", "most"),
    [({"quant_type": "a8w8"}, 0.05), ({"quant_type": "a16w4"}, 0.25), ({"vision_quant_type": "a8w8"}, 0.05)],
    ids=str,
)
def test_quantised_logits_stay_as_near_as_those_of_qwen2_vl(
    checkpoint: CheckpointMaker, arch: str, options: dict[str, Any], most: float
) -> None:
    folder = checkpoint(arch, size="small")
    case = prompt(folder, 9, image(128, 96, 1), 12, seed=3)

    def logits(**quantised: Any) -> torch.Tensor:
        config = EngineConfig(model=str(folder), dtype="bfloat16", device="cpu", quant_cache_gib=0, **quantised)
        driver = Driver(load_model(config))
        return driver.run(driver.start(case))

    exact = logits()
    if arch == "qwen3_5":  # whose layers add more to what a random model says
        most *= 1.5
    assert 0 < float((logits(**options) - exact).norm() / exact.norm()) < most
