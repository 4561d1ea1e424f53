"""Checkpoints of 8-bit floats give what the same numbers give when they are written out, also where blocks are cut
off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers import fp8
from dashinfer_vlm.layers.backend import Backend
from dashinfer_vlm.layers.card_backend import float_linears
from dashinfer_vlm.layers.linear import TorchLinear
from dashinfer_vlm.layers.ops import REFERENCE
from dashinfer_vlm.models import loading
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.models.stored import StoredFloats
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import driving, stored_pairs
from tests.models.driving import Driver, prompt
from tests.models.stored_pairs import Tensors

Write = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""A weight as 8-bit floats, their scales, and the numbers that both stand for."""

CASE = prompt(20)
QWEN = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [96, 48]}
"""Blocks that no size of the tiny model is a multiple of in both directions; published ones are 128 x 128."""


def compressed(strategy: str, **extra: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **extra}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def by_blocks(rows: int, columns: int) -> Write:
    """Written element by element, so that it shares nothing with the reader."""

    def write(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows, num_columns = weight.shape
        scale = torch.empty(-(-num_rows // rows), -(-num_columns // columns))
        stored, numbers = torch.empty_like(weight), torch.empty_like(weight)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scale[i, j] = weight[part].abs().max() / 448
                stored[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn).float()
                numbers[part] = stored[part] * scale[i, j]
        return stored.to(torch.float8_e4m3fn), scale, numbers.to(torch.bfloat16)

    return write


def by_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return stored, scale, (stored.float() * scale).to(torch.bfloat16)


def whole(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return stored, scale, (stored.float() * scale).to(torch.bfloat16)


def write_pair(origin: Path, to: Path, settings: dict[str, Any], suffix: str, write: Write) -> tuple[Path, Path]:
    """`stored_pairs.write_pair` with scales called X + suffix, and one of activations beside them."""

    def named(base: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers, scale, whole = write(weight.float())
        return {f"{base}.weight": numbers, base + suffix: scale, f"{base}.input_scale": torch.ones(1)}, whole

    return stored_pairs.write_pair(origin, to, settings, named)


def logits(folder: Path, **options: Any) -> torch.Tensor:
    config: dict[str, Any] = {"model": str(folder), "dtype": "bfloat16", "device": "cpu", "quant_cache_gib": 0}
    driver = Driver(load_model(EngineConfig(**config | options)))
    return driver.run(driver.start(CASE))


FORMATS: dict[str, tuple[dict[str, Any], str, Write]] = {
    "fp8, blocks": (QWEN, ".weight_scale_inv", by_blocks(96, 48)),
    "fp8, one scale": ({"quant_method": "fp8", "activation_scheme": "static"}, ".weight_scale", whole),
    "compressed-tensors, rows": (compressed("channel"), ".weight_scale", by_rows),
    "compressed-tensors, blocks": (
        compressed("block", block_structure=[96, 48]),
        ".weight_scale",
        by_blocks(96, 48),
    ),
    "compressed-tensors, one scale": (compressed("tensor"), ".weight_scale", lambda weight: whole(weight)),
}


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest, checkpoint: CheckpointMaker, tmp_path_factory: Any) -> tuple[Path, Path]:
    return write_pair(checkpoint("qwen3", dtype="bfloat16"), tmp_path_factory.mktemp("pair"), *FORMATS[request.param])


def test_logits_are_those_of_the_numbers_written_out(pair: tuple[Path, Path]) -> None:
    assert torch.equal(logits(pair[0]), logits(pair[1]))


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
def test_it_can_be_quantised_anew(pair: tuple[Path, Path]) -> None:
    assert torch.equal(logits(pair[0], quant_type="a8w8"), logits(pair[1], quant_type="a8w8"))


@pytest.mark.parametrize("arch", ["qwen3_vl", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_models_that_see_and_those_of_experts_or_states_are_read_too(
    checkpoint: CheckpointMaker, tmp_path: Path, arch: str
) -> None:
    pair = write_pair(checkpoint(arch, dtype="bfloat16"), tmp_path, *FORMATS["fp8, blocks"])
    assert torch.equal(logits(pair[0]), logits(pair[1]))


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NATIVE: dict[str, tuple[dict[str, Any], str, Write]] = {
    "blocks": (BLOCKS, ".weight_scale_inv", by_blocks(128, 128)),
    **{name: FORMATS[name] for name in ("fp8, one scale", "compressed-tensors, rows")},
}


@pytest.mark.parametrize("form", NATIVE)
def test_a_card_computes_with_the_numbers_as_they_are_stored(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pytest.importorskip("triton.knobs", reason="no triton that can be used")
    folder, written = write_pair(checkpoint("qwen3", dtype="bfloat16"), tmp_path, *NATIVE[form])
    whole_logits = logits(folder, dtype="float32")
    monkeypatch.setattr(loading, "choose_backend", plain_floats)
    model = load_model(EngineConfig(model=str(folder), dtype="float32", device="cpu"))
    down = model.decoder.layers[0].mlp.down  # type: ignore[attr-defined]
    name = "model.layers.0.mlp.down_proj.weight"
    stored = load_file(folder / "model.safetensors")[name]
    assert torch.equal(down.weight.numbers.view(torch.uint8), stored.view(torch.uint8))
    assert error(logits(folder, dtype="float32"), whole_logits) < 0.1
    assert error(logits(written, dtype="float32"), whole_logits) < 0.1


def test_joined_matrices_keep_their_own_scales(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="bfloat16"), tmp_path, *FORMATS["fp8, one scale"])
    config = read_config(folder)
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    rows = dict.fromkeys(names, config.text.intermediate_size)
    matrix = Weights(folder, config.family.names, config.stored).matrix(rows, config.text.hidden_size)
    assert matrix.read_floats is not None
    floats = matrix.read_floats()
    assert torch.equal((floats.numbers.float() * floats.scales).bfloat16(), matrix.read())


def test_blocks_that_a_join_would_cut_are_rounded_anew() -> None:
    def joined(stored: StoredFloats, *rows: int, part: slice = slice(None), columns: slice = slice(None)) -> bool:
        return stored.can_be_joined([(count, 256) for count in rows], [part] * len(rows), columns)

    blocks, by_row = StoredFloats((128, 128)), StoredFloats(None)
    assert joined(blocks, 128, 256, 100)
    assert not joined(blocks, 100, 128)
    assert not joined(StoredFloats((64, 128)), 128)
    assert joined(by_row, 100, 3, part=slice(1, 2))
    assert joined(blocks, 256, 256, part=slice(128, 256), columns=slice(0, 128))
    assert not joined(blocks, 256, part=slice(64, 128))
    assert not joined(blocks, 256, columns=slice(192, 256))


def plain_floats(device: torch.device, dtype: torch.dtype, *_: object) -> Backend:
    """What a card computes with `--quant-type fp8`, in plain torch."""
    linears = float_linears(device, dtype, fp8.REFERENCE)
    return Backend("torch", device, dtype, dtype, REFERENCE, linears, lambda w, b, e: TorchLinear(w.read(), b, e))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 5), (48, 320)], ids=str)
def test_cut_off_blocks_have_their_own_scales(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    stored, scale, numbers = by_blocks(128, 128)(weight)
    floats = StoredFloats((128, 128))
    assert tuple(scale.shape) in floats.scale_shapes(shape)
    assert torch.equal(floats.restore(stored, scale), numbers)
    assert torch.equal(floats.restore(stored, scale.bfloat16()), floats.restore(stored, scale.bfloat16().float()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method is 'aqlm'; supported: fp8, compressed-tensors, awq, gptq"),
        ({"bits": 4}, "quant_method is ''; supported: fp8, compressed-tensors"),
        (QWEN | {"fmt": "e5m2"}, "fmt is 'e5m2'; supported: e4m3"),
        (QWEN | {"weight_block_size": [128]}, r"weight_block_size is \[128\]; it must be two numbers"),
        (compressed("channel") | {"format": "nvfp4-pack-quantized"}, "supported: float-quantized, pack-quantized"),
        (compressed("channel", num_bits=4), "num_bits is 4; supported: 8"),
        (compressed("channel", type="int"), "type is 'int'; supported: float"),
        (compressed("group"), "strategy is 'group'; supported: tensor, channel, block"),
        (compressed("channel", symmetric=False), "symmetric is false"),
        (compressed("channel") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        (compressed("channel") | {"config_groups": {}}, "config_groups has 0 kinds of weights"),
    ],
)
def test_what_is_not_read_is_named(
    checkpoint: CheckpointMaker, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    stored_pairs.assert_refused(checkpoint("qwen3"), tmp_path, settings, message)


def test_scales_of_another_shape_and_missing_ones_are_named(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="bfloat16"), tmp_path, *FORMATS["fp8, blocks"])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file(tensors | {name: torch.ones(9, 9)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale_inv has shape \[9, 9\], not \[3, 3\]"):
        driving.load(folder)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is F8_E4M3, but the checkpoint has no scale for it"):
        driving.load(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is F8_E4M3, but config\.json has no quantization_config"):
        driving.load(folder)
