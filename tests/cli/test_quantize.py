"""`dashinfer-vlm quantize` leaves on disk what a start with the same flags looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.quantize import quantize
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers import quantise
from dashinfer_vlm.models.loading import load_model
from tests.conftest import CheckpointMaker
from tests.models.adapters import Adapter
from tests.models.driving import load_hf

needs_kernels = pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")


@needs_kernels
def test_what_it_made_is_found_by_the_next_start(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    types = ["--quant-type", "a16w4", "--vision-quant-type", "a8w8"]
    assert execute(quantize, [str(checkpoint()), *types, "--quant-cache", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[1] for line in printed] == [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    monkeypatch.setattr(quantise, "_pack", None)  # nothing is left for it to do
    flags = {"quant_type": "a16w4", "vision_quant_type": "a8w8", "quant_cache": str(tmp_path)}
    load_model(EngineConfig(model=str(checkpoint()), device="cpu", **flags))  # type: ignore[arg-type]


@needs_kernels
def test_an_adapter_has_weights_of_its_own(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Adapter(load_hf(checkpoint())).write(tmp_path / "adapter")
    for adapter in ([], ["--lora", str(lora)]):
        flags = ["--quant-type", "a8w8", "--quant-cache", str(tmp_path / "cache"), *adapter]
        assert execute(quantize, [str(checkpoint()), *flags]) == 0
    assert len(list((tmp_path / "cache").glob("text-*.safetensors"))) == 2
    monkeypatch.setattr(quantise, "_pack", None)
    cache = str(tmp_path / "cache")
    load_model(
        EngineConfig(model=str(checkpoint()), lora=str(lora), device="cpu", quant_type="a8w8", quant_cache=cache)
    )


@needs_kernels
def test_the_encoder_alone_can_be_quantised(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    assert execute(quantize, [str(checkpoint()), "--vision-quant-type", "a8w8", "--quant-cache", str(tmp_path)]) == 0
    assert [path.name.rsplit("-", 1)[0] for path in tmp_path.glob("*.safetensors")] == ["vision-a8w8"]


@needs_kernels
def test_what_cannot_be_kept_is_a_failure(
    checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quant-type", "a8w8", "--quant-cache", str(tmp_path), "--quant-cache-gib", "0.00001"]
    assert execute(quantize, [str(checkpoint()), *flags]) == 1
    assert "could not be kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to quantise"),
        (["--quant-type", "a8w8", "--quant-cache-gib", "0"], "keeps nothing"),
        (["--quant-type", "fp8"], "nothing to keep for the next start"),
        (["--port", "8000"], "No such option"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(quantize, flags) == 2
    assert message in capsys.readouterr().err
