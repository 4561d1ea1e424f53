"""Checkpoints of few bits give what the same numbers give when they are written out."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.info import info
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.models import quant_cache
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.family import Names
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.models.packed import StoredIntegers
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models import stored_pairs
from tests.models.driving import Driver, prompt
from tests.models.stored_pairs import Tensors

Write = Callable[[Tensor], tuple[Tensors, Tensor]]
"""A weight [N, K] as the tensors `X` + name of a checkpoint, and the numbers that they stand for."""

GROUP = 32
CASE = prompt(20)


def in_groups(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers from 0 on [N, K], zeros and float16 scales [N, groups], and what they stand for, one after the other."""
    rows, columns = weight.shape
    top = 2**bits - 1
    count = -(-columns // group)
    numbers, wide = torch.zeros(rows, columns, dtype=torch.int64), torch.zeros(rows, columns)
    zeros, scales = torch.zeros(rows, count, dtype=torch.int64), torch.zeros(rows, count, dtype=torch.float16)
    for j in range(count):
        part = weight[:, j * group : (j + 1) * group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, j] = ((high - low) / top).half()
        # as GPTQ writes them, less 1, zeros from 1 on alone have a place
        zeros[:, j] = (-low / scales[:, j].float()).round().clamp(1, top).long()
        found = (part / scales[:, j : j + 1].float()).round() + zeros[:, j : j + 1]
        numbers[:, j * group : (j + 1) * group] = found.clamp(0, top).long()
    for k in range(columns):
        wide[:, k] = (numbers[:, k] - zeros[:, k // group]).float() * scales[:, k // group].float()
    return numbers, zeros, scales, wide.half()


def words(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [A, B / n] of numbers [A, B]: number `order[i]` of n at bit `i * bits`."""
    each = 32 // bits
    out = torch.zeros(numbers.shape[0], numbers.shape[1] // each, dtype=torch.int64)
    for i in range(each):
        out |= numbers[:, (i if order is None else order[i]) :: each] << (bits * i)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    numbers, zeros, scales, wide = in_groups(weight, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed, of_zeros = words(numbers.t(), 4, order), words(zeros.t(), 4, order)
    return {".qweight": packed, ".qzeros": of_zeros, ".scales": scales.t().contiguous()}, wide


def gptq(bits: int, less: int = 1, *, shuffled: bool = False) -> Write:
    """`shuffled` columns are those of another order of groups (`desc_act`)."""

    def write(weight: Tensor) -> tuple[Tensors, Tensor]:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)) if shuffled else None
        numbers, zeros, scales, wide = in_groups(weight if order is None else weight[:, order], bits)
        group = torch.arange(columns) // GROUP
        if order is not None:
            back = order.argsort()
            numbers, wide, group = numbers[:, back], wide[:, back], group[back]
        tensors = {
            ".qweight": words(numbers.t().contiguous().t(), bits).t().contiguous(),
            ".qzeros": words((zeros - less).t(), bits),
            ".scales": scales.t().contiguous(),
            ".g_idx": group.to(torch.int32),
        }
        return tensors, wide

    return write


def by_library(state: Tensors, **weights: Any) -> tuple[Tensors, Tensor]:
    """What compressed-tensors itself writes of a weight and its scales, and reads of that."""
    if sys.version_info < (3, 11) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        pytest.skip("compressed-tensors needs Python 3.11 and torch 2.10")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **weights))
    packed = PackedQuantizationCompressor.compress(state, scheme)
    return packed, PackedQuantizationCompressor.decompress(packed, scheme)["weight"]


def compressed(bits: int, *, symmetric: bool) -> Write:
    def write(weight: Tensor) -> tuple[Tensors, Tensor]:
        middle = 2 ** (bits - 1)
        _, zeros, scales, _ = in_groups(weight, bits)
        if symmetric:
            scales = (weight.float().view(len(weight), -1, GROUP).abs().amax(2) / middle).half()
        state = {"weight": weight.half(), "weight_scale": scales}
        if not symmetric:
            state["weight_zero_point"] = (zeros - middle).to(torch.int8)
        packed, wide = by_library(state, num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP)
        return {f".{name}": tensor for name, tensor in packed.items()}, wide

    return write


def int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).half()
    numbers = (weight.float() / scale.float()).round().clamp(-128, 127)
    return {".weight": numbers.to(torch.int8), ".weight_scale": scale}, (numbers * scale.float()).half()


def of_library(form: str, **weights: Any) -> dict[str, Any]:
    kinds = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": kinds, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def turned(location: str) -> dict[str, Any]:
    turns = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}
    return of_library("pack-quantized") | {"transform_config": {"config_groups": {"R1": turns}}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
FORMATS: dict[str, tuple[dict[str, Any], Write]] = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq(4)),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, gptq(8)),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, less=0)),
    "gptq_v2 by its other name": (GPTQ | {"format": "gptq_v2"}, gptq(4, less=0)),
    "gptq in another order": (GPTQ | {"desc_act": True}, gptq(4, shuffled=True)),
    "compressed-tensors": (of_library("pack-quantized"), compressed(4, symmetric=True)),
    "compressed-tensors with zeros": (of_library("pack-quantized", symmetric=False), compressed(4, symmetric=False)),
    "compressed-tensors that was turned before": (turned("weight_output"), compressed(4, symmetric=True)),
    "compressed-tensors of 8 bits": (of_library("pack-quantized", num_bits=8), compressed(8, symmetric=True)),
    "compressed-tensors of bytes": (
        of_library("int-quantized", num_bits=8, strategy="channel", group_size=None),
        int8,
    ),
}


def write_pair(origin: Path, to: Path, settings: dict[str, Any], write: Write) -> tuple[Path, Path]:
    """`stored_pairs.write_pair`, with the biases of zeros that GPTQ writes for layers that have none."""

    def named(base: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        tensors, whole = write(weight)
        if settings["quant_method"] == "gptq" and "mlp" in base:
            tensors[".bias"] = torch.zeros(len(weight), dtype=torch.float16)
        return {base + suffix: x for suffix, x in tensors.items()}, whole

    return stored_pairs.write_pair(origin, to, settings, named)


def logits(folder: Path, **options: Any) -> Tensor:
    config: dict[str, Any] = {"model": str(folder), "dtype": "float32", "device": "cpu", "quant_cache_gib": 0}
    driver = Driver(load_model(EngineConfig(**config | options)))
    return driver.run(driver.start(CASE))


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest, checkpoint: CheckpointMaker, tmp_path_factory: Any) -> tuple[Path, Path]:
    return write_pair(checkpoint("qwen3", dtype="float16"), tmp_path_factory.mktemp("pair"), *FORMATS[request.param])


def test_logits_are_those_of_the_numbers_written_out(pair: tuple[Path, Path]) -> None:
    assert torch.equal(logits(pair[0]), logits(pair[1]))


def test_what_it_is_and_takes_is_told(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for folder in pair:
        assert execute(info, [str(folder)]) == 0
        told.append([line.split() for line in capsys.readouterr().out.splitlines()])
    stored, written = ({tuple(line[:1]): line for line in lines if line} for lines in told)
    assert "bits" in stored["stored",]
    assert "bits" not in written["stored",]
    assert stored["bfloat16",][:-1] == written["bfloat16",][:-1]  # but for the requests that free memory holds


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
def test_it_can_be_quantised_anew(pair: tuple[Path, Path]) -> None:
    assert torch.equal(logits(pair[0], quant_type="a16w8"), logits(pair[1], quant_type="a16w8"))


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
def test_4_bits_stay_what_they_are(pair: tuple[Path, Path], request: pytest.FixtureRequest) -> None:
    """What is lost is a little of activations, of scales and of the head; what is rounded to other 4 bits loses more.
    Columns in another order, and 8 bits, are rounded anew."""
    exact, anew = logits(pair[1]), logits(pair[1], quant_type="a16w4")
    got = logits(pair[0], quant_type="a16w4")
    name = request.node.callspec.params["pair"]
    if "8 bits" in name or "bytes" in name or "order" in name:
        assert torch.equal(got, anew)
        return
    assert _error(got, exact) < 0.02
    assert _error(anew, exact) > 0.08


@pytest.mark.parametrize("name", ["awq", "gptq of 8 bits"])
def test_who_expands_4_bits_hears_how_not_to(
    checkpoint: CheckpointMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, *FORMATS[name])
    hint = "weights are stored in 4 bits (awq), and were expanded; --quant-type a16w4 takes them as they are"
    with caplog.at_level(logging.INFO):
        load_engine(EngineConfig(model=str(folder), device="cpu", max_model_len=256), lambda *_: None)[0].close()
    assert (hint in caplog.text) == (name == "awq")


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
@pytest.mark.parametrize("group", [128, 64, -1])
def test_groups_of_other_sizes_stay_what_they_are(checkpoint: CheckpointMaker, tmp_path: Path, group: int) -> None:
    def write(weight: Tensor) -> tuple[Tensors, Tensor]:
        columns = weight.shape[1] if group < 0 else group
        numbers, zeros, scales, wide = in_groups(weight, 4, columns)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        packed, of_zeros = words(numbers.t(), 4, order), words(zeros.t(), 4, order)
        return {".qweight": packed, ".qzeros": of_zeros, ".scales": scales.t().contiguous()}, wide

    pair = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, AWQ | {"group_size": group}, write)
    assert torch.equal(logits(pair[0]), logits(pair[1]))
    assert _error(logits(pair[0], quant_type="a16w4"), logits(pair[1])) < 0.02


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_4_bits_of_experts_and_of_states_stay_what_they_are(
    checkpoint: CheckpointMaker, tmp_path: Path, arch: str
) -> None:
    pair = write_pair(checkpoint(arch, dtype="float16"), tmp_path, *FORMATS["awq"])
    exact = logits(pair[1])
    assert _error(logits(pair[0], quant_type="a16w4"), exact) < 0.05
    assert _error(logits(pair[1], quant_type="a16w4"), exact) > 0.1


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
def test_4_bits_as_they_are_stored_are_found_again(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, *FORMATS["awq"])
    options = {"quant_type": "a16w4", "quant_cache": str(tmp_path / "cache"), "quant_cache_gib": 1}
    first = logits(folder, **options)
    assert list((tmp_path / "cache").glob("text-a16w4-*.safetensors"))
    assert torch.equal(logits(folder, **options), first)


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
def test_what_is_kept_of_it_is_what_its_configuration_says(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_cache, "RACY_NS", 0)  # so that the files count as settled
    folder, _ = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, *FORMATS["gptq"])
    options = {"quant_type": "a16w8", "quant_cache": str(tmp_path / "cache")}
    first = logits(folder, quant_cache_gib=1, **options)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    now = logits(folder, quant_cache_gib=1, **options)
    assert torch.equal(now, logits(folder, quant_type="a16w8"))
    assert not torch.equal(now, first)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_are_cut_off_or_lie_in_another_order(bits: int) -> None:
    weight = torch.randn(6, 80)
    numbers, _, scales, _ = in_groups(weight, bits)
    of_column = torch.randint(3, (80,))
    stored, middle = StoredIntegers("compressed", bits, GROUP, has_zeros=False), 2 ** (bits - 1)
    for given, group in ((None, torch.arange(80) // GROUP), (of_column, of_column)):
        parts = {"scales": scales} | ({} if given is None else {"groups": given.int()})
        got = stored.restore(words(numbers, bits), parts, (6, 80))
        assert torch.equal(got, ((numbers - middle).float() * scales.float()[:, group]).half())


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_that_borrowed_from_their_neighbours(bits: int) -> None:
    """As GPTQModel takes 1 from all of a word at once, and gives it back."""
    top, each = 2**bits - 1, 32 // bits
    zeros = torch.randint(top + 1, (each * 3, 2))
    zeros[0], zeros[1], zeros[each - 1] = 0, top, 0
    ones = sum(1 << i for i in range(0, 32, bits))
    numbers = torch.randint(top + 1, (each * 3, 2 * GROUP))
    parts = {"scales": torch.ones(2, each * 3), "zeros": words(zeros.t(), bits) - ones}
    stored = StoredIntegers("gptq", bits, GROUP, zeros_less_one=True)
    got = stored.restore(words(numbers, bits).t(), parts, (each * 3, 2 * GROUP))
    assert torch.equal(got, (numbers - zeros.repeat_interleave(GROUP, 1)).float())


@pytest.mark.parametrize("group", [12, None])
def test_rows_whose_last_word_is_not_full(group: int | None, tmp_path: Path) -> None:
    """Such as the 3,420 columns of a matrix of Qwen2.5-VL's ViT."""
    strategy = "channel" if group is None else "group"
    weight = torch.randn(6, columns := 60)
    scales = weight.view(6, -1, group or columns).abs().amax(2) / 8
    state = {"weight": weight, "weight_scale": scales}
    packed, whole = by_library(state, num_bits=4, symmetric=True, strategy=strategy, group_size=group)
    save_file({f"x.{name}": tensor for name, tensor in packed.items()}, tmp_path / "model.safetensors")
    stored = StoredIntegers("compressed", 4, group or 0, has_zeros=False)
    weights = Weights(tmp_path, Names(parts={"text": ("x.",)}), stored)
    assert torch.equal(weights.take("x.weight", 6, columns), whole)


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_model_that_sees_is_read_too(checkpoint: CheckpointMaker, tmp_path: Path, arch: str) -> None:
    pair = write_pair(checkpoint(arch, dtype="float16"), tmp_path, *FORMATS["awq"])
    assert torch.equal(logits(pair[0]), logits(pair[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AWQ | {"version": "gemv"}, "version is 'gemv'; supported: gemm"),
        (AWQ | {"bits": 3}, "bits is 3; supported: 4"),
        (AWQ | {"zero_point": False}, "zero_point is false"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"bits": 3}, "bits is 3; supported: 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
        (GPTQ | {"format": "bitblas"}, "format is 'bitblas'; supported: gptq, gptq_v2"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype is 'int64'; supported: int32"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is true"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic gives some layers other bits"),
        (of_library("pack-quantized", num_bits=2), "num_bits is 2; supported: 4, 8"),
        (of_library("pack-quantized", type="float"), "type is 'float'; supported: int"),
        (turned("input"), "transform_config: .*location is 'input'; supported: weight_input, weight_output"),
        (of_library("int-quantized"), "num_bits is 4; supported: 8"),
        (of_library("pack-quantized", strategy="block"), "strategy is 'block'; supported: group, channel"),
    ],
)
def test_what_is_not_read_is_named(
    checkpoint: CheckpointMaker, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    stored_pairs.assert_refused(checkpoint("qwen3"), tmp_path, settings, message)


def test_layers_that_a_rule_leaves_whole_are_no_other_kind(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    settings = GPTQ | {"dynamic": {"-:.*visual.*": {}}}
    pair = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, settings, gptq(4))
    assert read_config(pair[0]).stored is not None


def test_parts_that_are_missing_or_of_another_shape_are_named(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, *FORMATS["awq"])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.scales"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.scales is missing"):
        logits(folder)
    zeros, numbers = name.replace("scales", "qzeros"), name.replace("scales", "qweight")
    for changed, message in (
        ({name: torch.ones(9, 9).half()}, r"q_proj\.qweight of .* numbers has scales of \[9, 9\], not \["),
        ({name: torch.ones(9, 9, 9).half()}, r"q_proj\.qweight has shape .* and scales of \[9, 9, 9\]"),
        ({zeros: tensors[zeros][:1]}, r"q_proj\.qweight of .* numbers has zeros of \[1, "),
        ({name: tensors[name].int()}, r"q_proj\.scales is I32, not BF16 or F16 or F32"),
        ({zeros: tensors[zeros].half()}, r"q_proj\.qzeros is F16, not I32"),
        ({numbers: tensors[numbers].long()}, r"q_proj\.qweight is I64, not I32"),
        ({numbers.replace("qweight", "weight"): torch.ones(9, 9)}, r"q_proj\.qweight is also stored whole"),
    ):
        save_file(tensors | changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            logits(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is I32; supported: BF16"):
        logits(folder)


def test_columns_of_groups_that_there_are_not_are_named(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, *FORMATS["gptq"])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.g_idx"
    save_file(tensors | {name: tensors[name] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight has \d+ groups of columns, and columns of others"):
        logits(folder)


def test_a_bias_that_the_model_has_no_place_for_must_be_zero(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder, _ = write_pair(checkpoint("qwen3", dtype="float16"), tmp_path, *FORMATS["gptq"])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {name: torch.ones_like(tensors[name])}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"the model has no place for tensor {name}"):
        logits(folder)
