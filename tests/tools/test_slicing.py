"""`tools/slicing.py` on tiny random checkpoints: pairs of equal work, and what the slices are."""

from __future__ import annotations

import json

import pytest

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.models import vit
from slicing import SlicingBench, measure_slicing, slicing
from tests.conftest import CheckpointMaker


def engine(folder: object, **options: object) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
def test_the_same_pictures_are_encoded_whole_and_in_slices(
    checkpoint: CheckpointMaker, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit, "CPU_SLICE_FLOPS", 1e6)
    monkeypatch.setattr(vit, "MIN_SLICE_ROWS", 16)
    config = SlicingBench(engine=engine(checkpoint(arch)), image_sizes=((112, 56), (224, 224)), repeats=3)
    pairs: list[str] = []
    small, large = measure_slicing(config, pairs.append)
    assert pairs == ["112x56"] * 4 + ["224x224"] * 4
    assert (small.num_tokens, large.num_tokens) == (8, 64)
    assert large.num_slices > small.num_slices > 10
    for one in (small, large):
        assert one.loss.least <= one.loss.median <= one.loss.most < 1
        assert 0 < one.longest_slice_s < one.sliced_s.most


def test_the_command_ends_in_a_table_and_one_json_object(
    checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--image-size", "84x56", "--repeats", "1", "--model", str(checkpoint()), "--dtype", "float32"]
    assert execute(slicing, flags) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert any("84x56" in line for line in shown)
    (result,) = json.loads(last)["results"]
    assert (result["image_size"], result["num_tokens"]) == ([84, 56], 6)


def test_what_cannot_be_sliced_is_refused(checkpoint: CheckpointMaker) -> None:
    with pytest.raises(ConfigError, match="transformers has no slices"):
        measure_slicing(SlicingBench(engine=engine("x", vision_engine="transformers")))
    with pytest.raises(ConfigError, match="100x56; both sides must be multiples of 28"):
        measure_slicing(SlicingBench(engine=engine(checkpoint()), image_sizes=((100, 56),)))
    with pytest.raises(ConfigError, match="--repeats is 0"):
        SlicingBench(engine=engine("x"), repeats=0).validate()
