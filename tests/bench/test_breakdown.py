"""`bench serve --breakdown`: what a tiny model's server says of its seconds, and the floor beside it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dashinfer_vlm.bench import floor as floor_module
from dashinfer_vlm.bench import serve
from dashinfer_vlm.bench.breakdown import Breakdown, TimePart, amounts, break_down
from dashinfer_vlm.bench.breakdown_report import breakdown_rows, breakdown_title
from dashinfer_vlm.bench.config import ServeBench
from dashinfer_vlm.bench.floor import Amounts, Floor, Rates, Work, measure_rates, read_work
from dashinfer_vlm.bench.readings import Reading, Readings
from dashinfer_vlm.bench.target import Target, parse_target
from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.engine.client import EngineClient
from dashinfer_vlm.engine.host.local import LocalEngine
from dashinfer_vlm.frontend.opening import open_service
from dashinfer_vlm.kernels import cpu_ops, threads
from dashinfer_vlm.server.app import create_app
from tests.bench.stand_in import Script, served
from tests.conftest import CheckpointMaker
from tests.server.conftest import TestedServer, listening
from tests.tokens import VOCAB

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 2, 128, 256, 4, 2, 32
TEXT_WEIGHTS = LAYERS * (HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HIDDEN * HEADS * HEAD_DIM + 3 * HIDDEN * INNER)
RATES = Rates(read_gb_s=10.0, gflop_s={"float32": 100.0, "int8": 400.0})
WORK = Work(
    patch_flops=4e9,
    patch_pair_flops=1e9,
    token_flops=1e9,
    token_pair_flops=2e9,
    head_flops=1e9,
    step_bytes=5e9,
    text_numbers="float32",
    vision_numbers="int8",
)
SMALL = ServeBench(
    targets=(), workload="single", clients=2, requests=4, rounds=1, warmup=1, output_tokens=6, image_size=(56, 56),
    breakdown=True,
)  # fmt: skip


async def start(config: EngineConfig) -> EngineClient:
    return LocalEngine.start(config)


async def test_the_seconds_of_a_server_add_up_and_a_peer_is_told_apart(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "measure_rates", lambda numbers: RATES)
    engine = EngineConfig(model=str(checkpoint()), dtype="float32", device="cpu", kv_cache_gib=0.1, threads=1)
    async with open_service(engine, MediaConfig(), start_engine=start) as service:
        settings = ServerConfig(host="127.0.0.1", port=0, log_level="warning")
        server = TestedServer(create_app(service, settings), service, settings)
        with served(Script("peer")) as peer:
            async with listening(server):
                port = server.servers[0].sockets[0].getsockname()[1]
                targets = (Target("ours", f"http://127.0.0.1:{port}/v1"), parse_target(f"peer={peer}"))
                ours, other = await serve.measure(replace(SMALL, targets=targets))

    assert other.breakdown is None
    assert "peer has no metrics at" in other.no_breakdown
    found = ours.breakdown
    assert found is not None
    assert found.num_requests == 4  # those of the warm-up came before the first reading
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.wall_s)
    parts = {part.name: part for part in found.parts}
    assert all(part.seconds > 0 for part in parts.values())
    streams = parts["decode"].streams
    assert sum(int(part.name) * (part.num_steps or 0) for part in streams) == 4 * 5
    assert max(int(part.name) for part in streams) <= 2
    assert found.waits["encode"].num == found.waits["prefill"].num == 4
    assert found.share_of_floor is not None
    assert json.loads(json.dumps(found.as_json()))["floor"]["encoder_s"] > 0


def test_the_work_of_a_model_is_read_from_its_folder(checkpoint: CheckpointMaker) -> None:
    facts = {
        "model": str(checkpoint()), "device": "cpu", "dtype": "float32", "quant_type": "a8w8",
        "vision_quant_type": "none",
    }  # fmt: skip
    work = read_work(facts)

    assert work is not None
    assert (work.token_flops, work.head_flops) == (2 * TEXT_WEIGHTS, 2 * VOCAB * HIDDEN)
    assert work.token_pair_flops == 4 * LAYERS * HEADS * HEAD_DIM
    assert work.step_bytes == pytest.approx(TEXT_WEIGHTS + VOCAB * HIDDEN, rel=0.1)  # a byte each, scales, norms
    assert (work.text_numbers, work.vision_numbers) == ("int8", "float32")
    assert read_work({**facts, "device": "cuda"}) is None
    assert read_work({**facts, "model": "qwen/elsewhere"}) is None


def test_a_patch_costs_its_encoder_and_a_quarter_of_the_merger(checkpoint: CheckpointMaker) -> None:
    facts = {"device": "cpu", "dtype": "float32", "quant_type": "none", "vision_quant_type": "none"}
    whole = read_work({**facts, "model": str(checkpoint("qwen2_vl"))})
    windows = read_work({**facts, "model": str(checkpoint("qwen2_5_vl"))})
    assert whole is not None
    assert windows is not None

    assert 0 < windows.patch_pair_flops < whole.patch_pair_flops
    assert whole.patch_flops < 2 * 8 * TEXT_WEIGHTS


def test_a_step_reads_the_experts_that_its_rows_choose(checkpoint: CheckpointMaker) -> None:
    facts = {"device": "cpu", "dtype": "float32", "quant_type": "none", "vision_quant_type": "none"}
    dense = read_work({**facts, "model": str(checkpoint("qwen3"))})
    mixed = read_work({**facts, "model": str(checkpoint("qwen3_moe"))})
    assert dense is not None
    assert mixed is not None

    expert = 3 * 96 * 128  # of the last layer, which has eight of which a token chooses three
    assert mixed.expert_bytes == 4 * 8 * expert
    assert mixed.token_flops - dense.token_flops == 2 * (3 * expert - 3 * 256 * 128 + 8 * 128)
    assert mixed.step_bytes - mixed.bytes_read(1) == pytest.approx(4 * 5 * expert)
    assert mixed.step_bytes - mixed.bytes_read(2) == pytest.approx(4 * 8 * (5 / 8) ** 2 * expert)
    assert dense.bytes_read(1) == dense.bytes_read(9) == dense.step_bytes


def test_the_floor_is_products_and_weights_at_full_speed_with_all_clients_in_a_step() -> None:
    asked = Amounts(num_items=2, num_patches=20, num_prompts=2, num_prompt_tokens=20, num_decoded=40)

    found = Floor.of(WORK, RATES, asked, 4)

    assert found.encoder_s == pytest.approx((4 * 20 + 2 * 10 * 10) / 400)
    assert found.prefill_s == pytest.approx((20 + 2 * 2 * 10 * 10 / 2) / 100)
    assert found.decode_s == pytest.approx(10 * 5 / 10)  # ten steps that read five of ten GB a second
    many = Floor.of(WORK, RATES, replace(asked, num_decoded=1000), 100)
    assert many.decode_s == pytest.approx(10 * 100 * 2 / 100)  # so many rows cost more than reading


def reading(time_s: float, **values: float) -> Reading:
    return Reading(
        time_s, {("dashinfer_" + key.partition("__")[0], key.partition("__")[2]): v for key, v in values.items()}, {}
    )


def counted() -> Readings:
    """Ten seconds, four of them idle."""
    found = Readings({})
    before = reading(0.0, engine_busy_seconds_total=5.0, engine_prefill_seconds_total=7.0)
    after = reading(
        10.0,
        engine_busy_seconds_total=11.0,
        engine_prefill_seconds_total=8.0,
        engine_encoder_seconds_total=2.0,
        engine_sampling_seconds_total=0.5,
        engine_decode_seconds_total__1=0.5,
        engine_decode_seconds_total__16=1.5,
        engine_decode_steps_total__1=5.0,
        engine_decode_steps_total__16=10.0,
        engine_num_prompt_tokens_total=60.0,
        engine_num_cached_tokens_total=20.0,
        engine_num_output_tokens_total=30.0,
        choices_total__length=2.0,
        request_seconds_count=2.0,
        stage_seconds_count__prefill=2.0,
        stage_seconds_sum__prefill=3.0,
    )  # fmt: skip
    found.add(before, after)
    return found


def test_what_no_counter_names_is_the_hosts_or_idle() -> None:
    found = break_down(counted(), 2, None, None)

    assert {part.name: part.seconds for part in found.parts} == pytest.approx(
        {"vision encoder": 2.0, "prompts": 1.0, "decode": 2.0, "choice of tokens": 0.5, "host": 0.5, "idle": 4.0}
    )
    assert [part.name for part in found.parts[2].streams] == ["16", "1"]
    assert found.waits["prefill"].mean_s == 1.5
    assert found.share_of_floor is None
    assert "no floor" in breakdown_title("ours", found)


def test_cached_tokens_and_first_tokens_are_no_work() -> None:
    found = amounts(counted())

    assert (found.num_prompt_tokens, found.num_decoded) == (40.0, 28.0)


def test_rounds_add_up() -> None:
    found = counted()
    found.add(reading(20.0), reading(25.0, engine_encoder_seconds_total=3.0))

    assert (found.wall_s, found.of("engine_encoder_seconds_total")) == (15.0, 5.0)


def test_workers_of_the_encoder_take_no_time_of_the_engine() -> None:
    found = counted()
    found.num_encoders = 1.0
    parts = {part.name: part.seconds for part in break_down(found, 2, None, None).parts}

    assert parts["vision encoder, elsewhere"] == 2.0
    assert parts["host"] == 2.5


def test_each_bar_begins_where_the_last_one_ends() -> None:
    parts = (TimePart("a", 5.0), TimePart("b", 2.5, 5, 1.0), TimePart("c", 2.5))
    rows = list(breakdown_rows(Breakdown(10.0, 2, parts, {}, None)))

    assert [row[3] for row in rows] == ["█" * 20, " " * 20 + "█" * 10, " " * 30 + "█" * 10]
    assert rows[1] == ("b", "1.250", "25.0%", rows[1][3], "5", "500.0", "0.500")


@pytest.mark.skipif(not cpu_ops.available(), reason="only native kernels compute with integers")
def test_the_machines_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "set_threads", lambda count: None)
    monkeypatch.setattr(floor_module, "_READ_BYTES", 1 << 23)
    monkeypatch.setattr(floor_module, "_PRODUCTS", ((32, 64, 64),))
    found = measure_rates({"int8", "bfloat16"})

    assert set(found.gflop_s) == {"int8", "bfloat16"}
    assert min(found.read_gb_s, *found.gflop_s.values()) > 0
