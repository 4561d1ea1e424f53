"""What a server refuses, the commands refuse that look at a checkpoint or prepare it, in the same words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.info import info
from dashinfer_vlm.cli.quantize import quantize
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker

NORM = "model.layers.1.input_layernorm.weight"
Change = Callable[[Path], None]


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, folder / "model.safetensors")


def with_one_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.9.gain": tensors[NORM].clone()}, folder / "model.safetensors")


def of_other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 16}))


@pytest.mark.parametrize("change", [without_a_tensor, with_one_more, of_other_shapes])
def test_a_checkpoint_that_does_not_fit_its_configuration(
    checkpoint: CheckpointMaker, tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError) as refusal:
        load_model(EngineConfig(model=str(folder), device="cpu"))
    assert execute(info, [str(folder)]) == 1
    assert str(refusal.value) in capsys.readouterr().err
    if cpu_ops.available():
        kept = tmp_path / "kept"
        assert execute(quantize, [str(folder), "--vision-quant-type", "a8w8", "--quant-cache", str(kept)]) == 1
        assert str(refusal.value) in capsys.readouterr().err
        assert not kept.exists()


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
def test_settings_that_a_model_cannot_have(
    checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--vision-quant-type", "a8w8", "--quant-cache", str(tmp_path)]
    assert execute(quantize, [str(checkpoint("qwen3")), *flags]) == 2
    assert "--vision-quant-type is set, but Qwen3ForCausalLM is a text model" in capsys.readouterr().err
