"""`bench latency` on a tiny random checkpoint: its parts add up, and its counts are those of the model's shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dashinfer_vlm.bench.latency import LatencyBench, Phase, measure_latency
from dashinfer_vlm.cli.bench import bench
from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.config import EngineConfig, QuantTypeName
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers import backend
from dashinfer_vlm.models import loading
from tests.conftest import CheckpointMaker
from tests.tokens import VOCAB

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 2, 128, 256, 4, 2, 32


@pytest.fixture(scope="module")
def phases(checkpoint: CheckpointMaker) -> dict[str, Phase]:
    """Two sequences after prompts of 40 tokens, and a picture of 4 tokens."""
    engine = EngineConfig(model=str(checkpoint()), device="cpu", dtype="float32", kv_cache_gib=0.5)
    config = LatencyBench(
        engine=engine, batch=2, prompt_tokens=40, output_tokens=3, image_size=(56, 56), repeats=2, breakdown=True
    )
    return {phase.name: phase for phase in measure_latency(config, lambda stage, done, total: None)}


def test_the_parts_of_a_phase_add_up_to_it(phases: dict[str, Phase]) -> None:
    assert list(phases) == ["prefill", "decode", "encode"]
    for phase in phases.values():
        assert sum(part.seconds for part in phase.parts.values()) > 0.5 * phase.seconds
        assert all(part.seconds >= 0 for part in phase.parts.values())
    assert [phase.num_tokens for phase in phases.values()] == [40, 2, 4]


def test_a_decode_step_reads_every_weight_once_and_multiplies_it_by_the_batch(phases: dict[str, Phase]) -> None:
    parts = phases["decode"].parts
    weights = LAYERS * (HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HIDDEN * HEADS * HEAD_DIM + 3 * HIDDEN * INNER)
    linear = [part for name, part in parts.items() if name.startswith("linear")]

    assert sum(part.num_flops for part in linear) == 2 * 2 * weights
    assert sum(part.num_bytes for part in linear) >= 4 * weights  # a packed layout may pad
    assert parts["head"].num_flops == 2 * 2 * VOCAB * HIDDEN
    assert sum(part.num_calls for part in linear) == 4 * LAYERS


def test_attention_counts_the_whole_context(phases: dict[str, Phase]) -> None:
    prefill, decode = phases["prefill"].parts["attention"], phases["decode"].parts["attention"]

    assert prefill.num_flops == LAYERS * 4 * HEADS * HEAD_DIM * (40 * 41 / 2)
    assert prefill.num_bytes == LAYERS * 40 * 2 * KV_HEADS * HEAD_DIM * 4
    # 40 tokens of prompt, one of the prefill step and two that warmed up are there when the first step is measured
    first = decode.num_flops / (LAYERS * 2 * 4 * HEADS * HEAD_DIM) - 1
    assert first == pytest.approx(43, abs=1)


def test_encoding_has_no_text_in_it(phases: dict[str, Phase]) -> None:
    parts = phases["encode"].parts

    assert {"attention", "norm", "rope", "patch embedding", "encoder, other"} <= set(parts)
    assert not {"head", "sampling", "rope, KV write", "scheduling"} & set(parts)


@pytest.mark.skipif(not cpu_ops.available(), reason="only native kernels compute with integers")
@pytest.mark.parametrize(
    ("quant_type", "integer", "of_head"), [("a8w8", "int8", "int8"), ("a16w4", "int4", "int8 in groups")]
)
def test_quantised_parts_say_so(
    checkpoint: CheckpointMaker, tmp_path: Path, quant_type: QuantTypeName, integer: str, of_head: str
) -> None:
    engine = EngineConfig(
        model=str(checkpoint()),
        device="cpu",
        kv_cache_gib=0.5,
        quant_type=quant_type,
        vision_quant_type="a8w8",
        quant_cache=str(tmp_path),
    )
    config = LatencyBench(
        engine=engine, prompt_tokens=4, output_tokens=1, image_size=(28, 28), repeats=1, breakdown=True
    )
    prefill, decode, encode = measure_latency(config, lambda stage, done, total: None)

    assert f"linear {2 * INNER}x{HIDDEN} {integer}" in prefill.parts
    assert f"head {of_head}" in decode.parts
    assert all(name.endswith("int8") for name in encode.parts if name.startswith("linear"))


def test_nothing_stays_instrumented(phases: dict[str, Phase]) -> None:
    assert phases
    assert vars(loading)["choose_backend"] is backend.choose_backend


def test_the_command_ends_in_json(checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "8", "--output-tokens", "2", "--repeats", "1", "--kv-cache-gib", "0.5"]
    code = execute(bench, ["latency", "--model", str(checkpoint()), "--dtype", "float32", "--breakdown", *sizes])

    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert code == 0
    assert any(line.startswith("decode: ") for line in shown)
    assert [phase["name"] for phase in result["phases"]] == ["prefill", "decode"]
    assert result["limits"]["read_gb_s"] > 0


def test_a_breakdown_of_several_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="one process; leave --parallel-size out"):
        LatencyBench(engine=EngineConfig(model="x", parallel_size=2), breakdown=True).validate()


def test_pictures_that_would_be_resized_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 28"):
        LatencyBench(engine=EngineConfig(model="x"), image_size=(448, 450)).validate()
