"""Checkpoints as they come: both namings, shards, and everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.family import VisionFamily
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import driving
from tests.models.driving import Driver, image, prompt

NAMES = VisionFamily.names
Tensors = dict[str, torch.Tensor]
CASE = prompt(4, image(56, 84), 3)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def original(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Path:
    return checkpoint(request.param)


def copy_of(folder: Path, to: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The checkpoint in `folder` with its tensors changed."""
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, to)
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors")
    return to


def logits(folder: Path) -> torch.Tensor:
    driver = Driver(driving.load(folder))
    return driver.run(driver.start(CASE))


def test_a_checkpoint_that_transformers_saved_gives_the_same_logits(original: Path, tmp_path: Path) -> None:
    driving.load_hf(original).save_pretrained(tmp_path)
    shutil.copy(original / "preprocessor_config.json", tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(tmp_path), logits(original))


def test_the_newer_names_give_the_same_logits(original: Path, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {newer_name(name): tensor for name, tensor in tensors.items()}

    assert torch.equal(logits(copy_of(original, tmp_path, rename)), logits(original))


def newer_name(name: str) -> str:
    for old, new in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def test_shards_give_the_same_logits(original: Path, tmp_path: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    folder = copy_of(original, tmp_path, lambda tensors: tensors)
    (folder / "model.safetensors").unlink()
    shards: dict[str, Tensors] = {f"model-{i}-of-3.safetensors": {} for i in (1, 2, 3)}
    for i, (name, tensor) in enumerate(tensors.items()):
        shards[f"model-{i % 3 + 1}-of-3.safetensors"][name] = tensor
    for name, part in shards.items():
        save_file(part, folder / name)
    places = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(folder), logits(original))


def test_a_tied_head_may_be_written_once_more(original: Path, tmp_path: Path) -> None:
    folder = copy_of(original, tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert torch.equal(logits(folder), logits(original))


def test_a_tied_head_with_other_values_is_refused(original: Path, tmp_path: Path) -> None:
    folder = copy_of(original, tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*tie_word_embeddings"):
        driving.load(folder)


def test_an_untied_head_is_its_own(checkpoint: CheckpointMaker) -> None:
    folder = checkpoint(size="small")
    driver = Driver(driving.load(folder))
    expected = driving.hf_logits(driving.load_hf(folder), CASE)
    torch.testing.assert_close(driver.run(driver.start(CASE)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "visual.blocks.0.attn.qkv.bias", "visual.patch_embed.proj.weight"]
)
def test_missing_extra_and_misshapen_tensors_are_named(original: Path, tmp_path: Path, name: str) -> None:
    changes: dict[str, Callable[[Tensors], Tensors]] = {
        f"tensor {name} is missing": lambda t: {key: value for key, value in t.items() if key != name},
        f"no place for tensor {name}2": lambda t: t | {name + "2": torch.zeros(1)},
        rf"tensor {name} has shape \[3, 1\], not": lambda t: t | {name: torch.zeros(3, 1)},
    }
    for message, change in changes.items():
        with pytest.raises(CheckpointError, match=message):
            driving.load(copy_of(original, tmp_path, change))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with two small tensors."""
    save_file({"model.a": torch.arange(6.0).view(2, 3), "visual.b": torch.ones(4)}, tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_come_with_progress_in_bytes(small: Path) -> None:
    seen: list[tuple[int, int]] = []
    weights = Weights(small, NAMES, None, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(weights.take("model.a", 2, 3), torch.arange(6.0).view(2, 3))
    with pytest.raises(CheckpointError, match=r"no place for tensor visual\.b"):
        weights.finish()
    weights.take("visual.b", 4)
    weights.finish()
    assert seen == [(24, 40), (40, 40)]


def test_a_file_that_was_cut_off_is_named(small: Path) -> None:
    path = small / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 20, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
            Weights(small, NAMES, None)


def test_a_file_of_another_kind_is_named(small: Path) -> None:
    (small / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        Weights(small, NAMES, None)


def test_a_tensor_of_whole_numbers_is_named(small: Path) -> None:
    save_file({"model.a": torch.arange(6)}, small / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.a is I64; supported: BF16, F16, F32"):
        Weights(small, NAMES, None)


def test_a_tensor_in_two_shards_is_named(small: Path) -> None:
    shutil.copy(small / "model.safetensors", small / "second.safetensors")
    places = {"model.a": "model.safetensors", "visual.b": "second.safetensors"}
    (small / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"tensor model\.a is also in"):
        Weights(small, NAMES, None)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": {"model.a": "../model.safetensors"}}', "not a file name"),
        ('{"weight_map": {"model.a": 3}}', "not a file name"),
        ('{"weight_map": {"model.a": "gone.safetensors"}}', r"gone\.safetensors is missing"),
    ],
)
def test_a_bad_index_says_what_is_wrong(small: Path, index: str, message: str) -> None:
    (small / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        Weights(small, NAMES, None)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Weights(tmp_path, NAMES, None)
