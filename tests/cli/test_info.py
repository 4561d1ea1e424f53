"""`dashinfer-vlm info`: told from headers, and true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.info import VISION, info
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine import memory
from dashinfer_vlm.hub import DEMO_MODEL
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedWeight
from dashinfer_vlm.layers.quantise import QUANT_TYPES
from dashinfer_vlm.models.config import read_config
from dashinfer_vlm.models.family import Part
from dashinfer_vlm.models.footprint import PRECISIONS, kv_token_bytes, num_parameters, weight_bytes
from dashinfer_vlm.models.loading import allocate_kv, load_model
from dashinfer_vlm.models.weights import Weights
from tests.conftest import CheckpointMaker
from tests.models.adapters import Adapter
from tests.models.driving import load_hf
from tests.rerankers import publish


def test_it_tells_family_parameters_pictures_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(info, []) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "family Qwen2VLForConditionalGeneration" in lines
    assert "parameters 3.3 million: text 1.8 million, vision 1.5 million" in lines
    assert "448 x 448 112 x 112 16" in lines
    for precision in PRECISIONS:
        assert any(line.startswith(f"{precision} ") and " yes " in line for line in lines)


def test_it_tells_of_an_adapter(
    checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = Adapter(load_hf(checkpoint()), lambda module: module.endswith("q_proj")).write(tmp_path)
    assert execute(info, [str(checkpoint()), "--lora", str(lora)]) == 0
    assert "adapter adds to 2 matrices" in " ".join(capsys.readouterr().out.split())


def test_bounds_of_pictures_are_those_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(info, ["--max-pixels", "3136"]) == 0
    assert "448 x 448 56 x 56 4" in " ".join(capsys.readouterr().out.split())


def test_no_weight_is_read(checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is all header: the numbers are a hole in it."""
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    with file.open("r+b") as opened:
        opened.truncate(header)
        opened.truncate(size)
    assert execute(info, [str(folder)]) == 0
    assert "parameters" in capsys.readouterr().out


def test_a_text_model_has_no_pictures(checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(info, [str(checkpoint("qwen3"))]) == 0
    printed = capsys.readouterr().out
    assert "vision 0.0 million" in printed
    assert "Pictures" not in printed


def test_what_gives_vectors_says_of_how_many_numbers(
    checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "embeds"
    shutil.copytree(checkpoint("qwen3"), folder)
    (folder / "modules.json").write_text('[{"type": "Transformer"}]')
    assert execute(info, [str(folder)]) == 0
    assert "vectors of 128 numbers" in " ".join(capsys.readouterr().out.split())
    assert execute(info, [str(checkpoint("qwen3"))]) == 0
    assert "of 128 numbers" not in capsys.readouterr().out


def test_what_scores_pairs_says_so(
    checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(info, [str(publish(checkpoint("qwen3"), tmp_path / "scores"))]) == 0
    assert "scores of pairs" in " ".join(capsys.readouterr().out.split())


def test_states_are_told_and_counted(checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]) -> None:
    """Three layers: 128 + 64 x 3 inputs and 4 memories of 16 x 24, all float32."""
    assert execute(info, [str(checkpoint("qwen3_5")), "--max-model-len", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "states 23.6 KiB a request" in printed


def test_what_a_token_takes_of_a_mixture_is_told(
    checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(info, [str(checkpoint("qwen3_moe"))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "parameters 1.1 million: text 1.1 million" in told
    assert "experts 8, of which a token takes 3: 0.9 million parameters" in told


def test_a_shared_expert_is_told(checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]) -> None:
    """Five of eight experts of 3 x 96 x 128 numbers in each of four layers are left out."""
    assert execute(info, [str(checkpoint("qwen3_5_moe"))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "text 2.7 million" in told
    assert "experts 8, of which a token takes 3 and a shared one: 1.9 million parameters" in told


def test_an_unknown_family_is_refused(
    checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Other"]}))
    assert execute(info, [str(folder)]) == 1
    assert "Other" in capsys.readouterr().err


def test_parameters_are_those_of_the_files() -> None:
    weights = demo_weights()
    parameters = num_parameters(weights.shapes("text")) + num_parameters(weights.shapes("vision"))
    assert 2 * parameters == weights.num_bytes


@pytest.mark.skipif(not cpu_ops.available(), reason="needs the native kernels")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_are_those_of_a_loaded_model(precision: str, tmp_path: Path) -> None:
    quantised = precision in QUANT_TYPES
    types = {"quant_type": precision, "vision_quant_type": VISION[precision]} if quantised else {"dtype": precision}
    settings: dict[str, Any] = {**types, "quant_cache": str(tmp_path)}
    model = load_model(EngineConfig(model=str(DEMO_MODEL), device="cpu", **settings))
    text, vision = (demo_weights().shapes(part) for part in get_args(Part))
    told = weight_bytes(text, precision) + weight_bytes(vision, VISION.get(precision, precision))
    assert held_bytes(model, set()) == pytest.approx(told, rel=0.01)


def test_8_bit_floats_have_a_scale_for_each_row_and_leave_embedding_and_head() -> None:
    shapes = {"model.layers.0.mlp.experts.0.up_proj.weight": (48, 128), "model.layers.0.mlp.gate.weight": (8, 128),
              "model.embed_tokens.weight": (1000, 128), "lm_head.weight": (1000, 128)}  # fmt: skip
    assert weight_bytes(shapes, "fp8") == 48 * (128 + 4) + 4 * 8 * 128 + 2 * 2 * 1000 * 128


def test_a_card_has_precisions_of_its_own(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("qwen3_vl_moe")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 30)
    assert execute(info, [str(folder)]) == 0
    table = capsys.readouterr().out.split("cuda:0, a card: 1.0 GiB are free")[1].split("Pictures")[0]
    told = [line.split()[0] for line in table.splitlines() if " yes " in line]
    assert told == ["bfloat16", "float32", "fp8", "a16w8", "a16w4"]


def test_a_token_of_kv_is_what_the_cache_takes() -> None:
    model = load_model(EngineConfig(model=str(DEMO_MODEL), device="cpu"))
    kv = allocate_kv(model, 3, 16)
    token = kv_token_bytes(read_config(DEMO_MODEL).text, torch.bfloat16)
    assert token * 3 * 16 == sum(tensor.nbytes for tensor in (*kv.keys, *kv.values))


def demo_weights() -> Weights:
    return Weights(DEMO_MODEL, read_config(DEMO_MODEL).family.names, None)


def held_bytes(thing: object, seen: set[int]) -> int:
    """Bytes of all tensors and packed weights that can be reached, each once."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, PackedWeight):
        return thing.num_bytes
    if isinstance(thing, torch.Tensor):
        return 0 if thing.untyped_storage().data_ptr() in seen else _mark(thing, seen)
    if isinstance(thing, (list, tuple)):
        return sum(held_bytes(item, seen) for item in thing)
    if not type(thing).__module__.startswith("dashinfer_vlm"):
        return 0
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]
    return sum(held_bytes(value, seen) for value in values)


def _mark(tensor: torch.Tensor, seen: set[int]) -> int:
    seen.add(tensor.untyped_storage().data_ptr())
    return tensor.nbytes
