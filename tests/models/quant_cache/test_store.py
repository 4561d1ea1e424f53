"""A second start with the same flags computes with the very weights of the first, and quantises nothing."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm import envs
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError, ConfigError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers import quantise
from dashinfer_vlm.layers.linear import Matrix
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.family import Part
from dashinfer_vlm.models.loading import load_encoder, load_model
from dashinfer_vlm.models.quant_cache import open_store
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models.driving import Driver, image, prompt

CASE = prompt(9, image(112, 84, 1), 12, seed=3)
BOTH = {"quant_type": "a8w8", "vision_quant_type": "a8w8"}

pytestmark = pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that were quantised so far."""
    shapes: list[Any] = []
    pack = quantise._pack

    def counting(weight: Matrix, shape: cpu_ops.PackedShape, dtype: torch.dtype) -> cpu_ops.PackedWeight:
        shapes.append(shape)
        return pack(weight, shape, dtype)

    monkeypatch.setattr(quantise, "_pack", counting)
    return shapes


def config(folder: Path, cache: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", quant_cache=str(cache), **options)


def logits(folder: Path, cache: Path, **options: Any) -> torch.Tensor:
    driver = Driver(load_model(config(folder, cache, **options)))
    return driver.run(driver.start(CASE))


@pytest.mark.parametrize(("device", "reads"), [("cpu", True), ("cuda", False)])
def test_a_card_which_keeps_nothing_does_not_read_the_weights_to_know_them_again(
    checkpoint: CheckpointMaker, cache: Path, monkeypatch: pytest.MonkeyPatch, device: str, reads: bool
) -> None:
    asked = config(checkpoint(), cache, quant_type="a16w4")
    found = read_config(Path(asked.model))
    read = []

    def fingerprint(weights: Weights, part: Part) -> bytes:
        read.append(part)
        return bytes(32)

    monkeypatch.setattr(Weights, "fingerprint", fingerprint)
    weights = Weights(found.folder, found.family.names, found.stored)
    with open_store(asked, weights, "text", torch.bfloat16, torch.device(device)) as store:
        assert (store is not None) == bool(read) == reads


def entries(cache: Path) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in cache.glob("*.safetensors"))


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("quant_type", ["a8w8", "a16w8", "a16w4"])
@pytest.mark.parametrize("size", ["tiny", "small"])  # tied and untied heads
def test_the_second_start_has_the_same_logits_and_quantises_nothing(
    checkpoint: CheckpointMaker, cache: Path, packed: list[Any], arch: str, quant_type: str, size: str
) -> None:
    options = {"quant_type": quant_type, "vision_quant_type": "a8w8"}
    first = logits(checkpoint(arch, size=size), cache, **options)
    assert packed
    assert entries(cache) == [f"text-{quant_type}", "vision-a8w8"]
    packed.clear()
    assert torch.equal(logits(checkpoint(arch, size=size), cache, **options), first)
    assert not packed


def test_the_encoder_alone_finds_what_the_engine_left(
    checkpoint: CheckpointMaker, cache: Path, packed: list[Any]
) -> None:
    load_model(config(checkpoint(), cache, vision_quant_type="a8w8"))
    packed.clear()
    load_encoder(config(checkpoint(), cache, vision_quant_type="a8w8"))
    assert not packed


def test_a_copy_of_the_checkpoint_elsewhere_is_the_same_checkpoint(
    checkpoint: CheckpointMaker, cache: Path, tmp_path: Path, packed: list[Any]
) -> None:
    first = logits(checkpoint(), cache, **BOTH)
    packed.clear()
    assert torch.equal(logits(shutil.copytree(checkpoint(), tmp_path / "copy"), cache, **BOTH), first)
    assert not packed


def change_one_weight(folder: Path, to: Path, name: str) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, to / "model.safetensors")
    return to


def test_one_changed_weight_makes_another_checkpoint(
    checkpoint: CheckpointMaker, cache: Path, tmp_path: Path, packed: list[Any]
) -> None:
    logits(checkpoint(), cache, **BOTH)
    packed.clear()
    other = change_one_weight(checkpoint(), tmp_path / "other", "model.layers.0.mlp.down_proj.weight")
    fresh = logits(other, cache, quant_cache_gib=0, **BOTH)
    packed.clear()
    assert torch.equal(logits(other, cache, **BOTH), fresh)
    assert {shape.num_rows for shape in packed}
    assert entries(cache) == ["text-a8w8", "text-a8w8", "vision-a8w8"]  # the ViT is the same


@pytest.mark.parametrize("other", [{"quant_type": "a16w8"}, {"dtype": "float32"}], ids=str)
def test_other_settings_have_files_of_their_own(
    checkpoint: CheckpointMaker, cache: Path, packed: list[Any], other: dict[str, str]
) -> None:
    load_model(config(checkpoint(), cache, quant_type="a8w8"))
    packed.clear()
    load_model(config(checkpoint(), cache, **{"quant_type": "a8w8", **other}))
    assert packed
    assert len(entries(cache)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
        lambda whole: b"",
        lambda whole: whole * 2,
    ],
    ids=["cut off", "one bit", "empty", "twice"],
)  # fmt: skip
def test_a_damaged_file_costs_a_line_in_the_log_and_is_made_again(
    checkpoint: CheckpointMaker,
    cache: Path,
    packed: list[Any],
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = logits(checkpoint(), cache, quant_type="a8w8")
    (path,) = cache.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(checkpoint(), cache, quant_type="a8w8"), first)
    assert caplog.text.count("quantising again") == 1
    assert path.read_bytes() == whole
    packed.clear()
    assert torch.equal(logits(checkpoint(), cache, quant_type="a8w8"), first)
    assert not packed


def test_a_cache_of_no_size_is_no_cache(checkpoint: CheckpointMaker, cache: Path) -> None:
    load_model(config(checkpoint(), cache, quant_cache_gib=0, quant_type="a8w8"))
    assert not cache.exists()


def test_whole_weights_leave_nothing(checkpoint: CheckpointMaker, cache: Path) -> None:
    load_model(config(checkpoint(), cache))
    assert not cache.exists()


def test_a_checkpoint_with_something_wrong_leaves_nothing(
    checkpoint: CheckpointMaker, cache: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint(), tmp_path / "wrong")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"visual.surplus": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for tensor visual\.surplus"):
        load_model(config(folder, cache, **BOTH))
    assert entries(cache) == []


def test_a_folder_that_is_none_is_refused(checkpoint: CheckpointMaker, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(ConfigError, match=r"--quant-cache .* is not a folder"):
        load_model(config(checkpoint(), cache, quant_type="a8w8"))


def test_without_a_folder_it_lies_below_the_users_caches(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_model(EngineConfig(model=str(checkpoint()), device="cpu", quant_type="a8w8"))
    assert entries(tmp_path / "dashinfer-vlm" / "quantised") == ["text-a8w8"]


def test_a_relative_cache_home_means_nothing_as_the_standard_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "/home/someone")
    assert envs.cache_folder() == Path("/home/someone/.cache/dashinfer-vlm")
