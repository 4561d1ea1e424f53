"""Both families against `transformers`, in float32."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dashinfer_vlm.layers import backend
from dashinfer_vlm.models import loading, vit
from dashinfer_vlm.models.base import Model
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.driving import Driver, Prompt, greedy, hf_logits, image, normalised, patches_of, prompt, run_vit

PROMPTS = {
    "text only": prompt(40),
    "one image": prompt(11, image(168, 112), 9),
    "image first and last": prompt(image(56, 56), 5, image(84, 112, seed=1)),
    "three images interleaved": prompt(7, image(112, 84), 3, image(28, 196, seed=1), 4, image(140, 140, seed=2), 6),
    "video": prompt(6, image(84, 84, frames=6, seconds_per_grid=0.5), 8),
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture(params=PROMPTS)
def case(request: pytest.FixtureRequest) -> Prompt:
    return PROMPTS[request.param]


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_equal_those_of_transformers_in_chunks_of_any_size(
    model: Model, hf: Any, case: Prompt, chunk: int
) -> None:
    driver = Driver(model)
    assert_close(driver.run(driver.start(case), chunk), hf_logits(hf, case))


def test_a_batch_of_sequences_gives_each_the_logits_it_has_alone(model: Model, hf: Any) -> None:
    driver = Driver(model)
    lives = [driver.start(case) for case in PROMPTS.values()]
    first = driver.step([(life, 3 + i) for i, life in enumerate(lives)])
    rest = driver.step([(life, len(life.ids) - life.num_done) for life in lives])
    for case, before, after in zip(PROMPTS.values(), first, rest, strict=True):
        assert_close(torch.cat([before, after]), hf_logits(hf, case))


def test_decoding_beside_a_prefill_equals_a_prefill_of_everything(model: Model, hf: Any) -> None:
    driver = Driver(model)
    case, other = PROMPTS["three images interleaved"], PROMPTS["one image"]
    life, beside = driver.start(case), driver.start(other)
    logits = [driver.run(life)]
    for _ in range(6):
        life.append(int(logits[-1][-1].argmax()))
        logits.append(driver.step([(life, 1), (beside, 5)])[0])
    whole = Prompt(life.ids, case.items)
    assert_close(torch.cat(logits), hf_logits(hf, whole))


def test_64_greedy_tokens_equal_those_of_transformers(model: Model, hf: Any) -> None:
    driver = Driver(model)
    case = PROMPTS["one image"]
    with torch.no_grad():
        theirs = hf.generate(**case.hf_inputs(), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert greedy(driver, case, 64, forbidden=model.eos_token_ids) == theirs[0, len(case.ids) :].tolist()


def test_only_the_wanted_rows_get_logits(model: Model) -> None:
    driver = Driver(model)
    case = PROMPTS["one image"]
    every = driver.run(driver.start(case))
    life = driver.start(case)
    batch = driver._batch([(life, len(life.ids))])
    rows = torch.tensor([len(life.ids) - 1, 3])
    for wanted in (rows, rows[:0]):
        batch = type(batch)(**{name: getattr(batch, name) for name in batch.__slots__} | {"logits_rows": wanted})
        logits = model.forward(batch, driver.kv)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, every[wanted])


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
def test_a_bfloat16_checkpoint_gives_the_greedy_tokens_of_its_values_in_float32(
    checkpoint: CheckpointMaker, arch: str
) -> None:
    folder = checkpoint(arch, dtype="bfloat16")
    ours, reference = (Driver(driving.load(folder, dtype)) for dtype in ("bfloat16", "float32"))
    assert ours.kv.keys[0].dtype == torch.bfloat16
    for seed in range(3):
        case = prompt(12, image(112, 112, seed), 10, seed=seed)
        assert greedy(ours, case, 16) == greedy(reference, case, 16)


@pytest.mark.gpu
def test_a_card_gives_the_logits_of_the_cpu(folder: Path, hf: Any, case: Prompt) -> None:
    driver = Driver(driving.load(folder, device="cuda"))
    torch.testing.assert_close(driver.run(driver.start(case), 7).cpu(), hf_logits(hf, case), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "grid", [(1, 2, 2), (1, 8, 12), (1, 34, 6), (1, 18, 20), (3, 10, 12)], ids=lambda grid: "x".join(map(str, grid))
)
def test_the_vit_equals_that_of_transformers_also_beyond_whole_windows(
    model: Model, hf: Any, grid: tuple[int, int, int]
) -> None:
    patches = random_patches(grid)
    with torch.no_grad():
        theirs = hf.model.visual(normalised(patches), torch.tensor([grid])).pooler_output
    assert_close(run_vit(model, [patches], [grid])[0], theirs)


GRIDS = [(1, 8, 12), (2, 4, 6), (1, 8, 12), (1, 2, 2), (1, 20, 18)]


def test_a_packed_batch_equals_each_item_alone(model: Model) -> None:
    items = [random_patches(grid, seed) for seed, grid in enumerate(GRIDS)]
    together = run_vit(model, items, GRIDS)
    for patches, grid, embedding in zip(items, GRIDS, together, strict=True):
        torch.testing.assert_close(embedding, run_vit(model, [patches], [grid])[0], atol=1e-6, rtol=1e-5)


def test_slices_of_one_block_equal_the_whole(model: Model) -> None:
    items = [random_patches(grid, seed) for seed, grid in enumerate(GRIDS)]
    for whole, sliced in zip(run_vit(model, items, GRIDS), run_vit(model, items, GRIDS, 1), strict=True):
        assert torch.equal(whole, sliced)


def test_nothing_of_a_finished_batch_stays_until_python_looks_for_cycles(model: Model) -> None:
    """A card's memory is no reason for it to look."""
    assert model.encoder is not None
    state = model.encoder.begin([random_patches(GRIDS[0])], GRIDS[:1])
    assert isinstance(state, vit.VitState)
    hidden = weakref.ref(state.hidden)
    gc.disable()
    try:
        while not state.done:
            model.encoder.run(state, 1)
        model.encoder.finish(state)
        del state
        assert hidden() is None
    finally:
        gc.enable()


def test_the_transformers_tower_agrees_with_ours(model: Model, folder: Path) -> None:
    tower = driving.load(folder, vision_engine="transformers")
    items = [random_patches(grid, seed) for seed, grid in enumerate(GRIDS)]
    for ours, theirs in zip(run_vit(model, items, GRIDS), run_vit(tower, items, GRIDS, 1), strict=True):
        assert_close(ours, theirs)


def random_patches(grid: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (grid[0] * grid[1] * grid[2], 1176), dtype=torch.uint8, generator=generator)


def test_patches_of_the_processor_are_those_that_transformers_normalises() -> None:
    item = image(112, 84)
    assert item.grid == (1, 6, 8)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 84, 112, 3), dtype=np.uint8)[0]
    reference = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 10**6})
    theirs = reference(pixels, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalised(patches_of(item)), theirs, atol=1e-5, rtol=0)


def test_one_head_of_a_large_picture_is_cut_by_its_queries(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit, "MIN_SLICE_ROWS", 12)
    encoder: Any = driving.load(checkpoint("qwen2_vl")).encoder
    block = encoder.blocks[0]
    pairs, num_rows = 60**2 + 40**2, 100  # two segments
    per_head = 4 * block.head_dim * pairs
    heads = list(block._attention_pieces(pairs, num_rows, 2 * per_head))
    assert heads == [(slice(0, 100), slice(0, 2)), (slice(0, 100), slice(2, 4))]
    parts = list(block._attention_pieces(pairs, num_rows, per_head / 4))
    assert len(parts) == 4 * block.num_heads
    assert [rows for rows, part in parts if part == slice(1, 2)] == [slice(i, i + 25) for i in range(0, 100, 25)]


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
def test_the_smallest_slices_give_the_embeddings_of_the_whole(
    checkpoint: CheckpointMaker, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(arch)
    items = [random_patches(grid, seed) for seed, grid in enumerate(GRIDS)]
    whole = run_vit(driving.load(folder), items, GRIDS)
    monkeypatch.setattr(vit, "CPU_SLICE_FLOPS", 1.0)
    monkeypatch.setattr(vit, "MIN_SLICE_ROWS", 12)
    encoder = driving.load(folder).encoder
    assert encoder is not None
    state = encoder.begin(items, GRIDS)
    num_slices = 0
    while not state.done:
        encoder.run(state, 1)
        num_slices += 1
    for ours, theirs in zip(encoder.finish(state), whole, strict=True):
        assert_close(ours, theirs)
    assert num_slices > 100


def test_patches_are_embedded_in_slices_too(checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit, "CPU_SLICE_FLOPS", 2 * 1176 * 64 * 100.0)  # a hundred patches of a ViT of width 64
    monkeypatch.setattr(vit, "MIN_SLICE_ROWS", 12)
    encoder: Any = driving.load(checkpoint("qwen2_vl")).encoder
    embed, embedded = encoder.embed, []

    def watched(patches: torch.Tensor) -> torch.Tensor:
        embedded.append(len(patches))
        rows: torch.Tensor = embed.project(patches)
        return rows

    watched.flops_per_patch = embed.flops_per_patch  # type: ignore[attr-defined]
    monkeypatch.setattr(encoder, "embed", watched)
    state = encoder.begin([random_patches((1, 20, 20))], [(1, 20, 20)])
    assert embedded == []
    encoder.run(state, 2)
    assert embedded == [100, 100]
    encoder.run(state, 2)
    assert sum(embedded) == 400


def test_channels_that_are_padded_change_no_number(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for cards, whose products want rows that begin at multiples of 16 bytes."""
    folder, choose = checkpoint("qwen2_5_vl"), backend.choose_backend
    plain = driving.load(folder)
    monkeypatch.setattr(loading, "choose_backend", lambda *a, **k: replace(choose(*a, **k), channel_unit=112))
    padded: Any = driving.load(folder)
    widths = {block.mlp.down(torch.zeros(1, 224)).shape[1] for block in padded.encoder.blocks}
    assert widths == {padded.config.vision.width}  # which takes no other number of columns than 224
    items = [random_patches(grid, seed) for seed, grid in enumerate(GRIDS)]
    for ours, theirs in zip(run_vit(padded, items, GRIDS), run_vit(plain, items, GRIDS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
