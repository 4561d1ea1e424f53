"""What the compiler makes of the kernels for an H100 (sm_90), on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

pytestmark = [pytest.mark.cards, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[3]
REGISTERS = 65536
"""Of a multiprocessor; a program's are `registers * warps * 32`."""
SHARED = 227 << 10
"""Bytes that one program can have; a multiprocessor has 1 KiB more, and takes as much for each."""
PRODUCTS_OF_WARP_GROUPS = (*("prefill plain", "long prefill plain", "prefill int8", "ViT attention in frames"),)
PICTURES = "ViT attention in frames"
SPILLING = "long prefill plain"
"""Held to half the registers, so that two programs fit beside each other, and spilling in its loops: 551 us instead of
717 for 8,192 rows of 2B, 1,092 instead of 1,463 of 7B."""
INT8_PROMPTS = ("prefill int8", "long prefill int8", "few rows beside others int8",
                "few rows beside others in 8 splits int8")  # fmt: skip
"""128 keys at a time spill a little, and took 2.26 ms for 8,192 rows of 7B where 64 keys took 2.69."""
STATES = "states of prompts"
"""Chunks are prepared by three programs beside each other, which spills outside of loops."""
SPILLS_IN_LOOPS = {SPILLING: 40, STATES: 0, **dict.fromkeys(INT8_PROMPTS, 2)}
WIDE = "Qwen3.5-9B"
"""Heads of 256."""
MODELS = ("Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen3-VL-8B", WIDE)
MIXTURE = "Qwen3-VL-30B-A3B"


@dataclass(frozen=True, slots=True)
class Found:
    variants: list[dict[str, Any]]

    def of(self, *kernels: str) -> list[dict[str, Any]]:
        return [x for x in self.variants if x["kernel"] in kernels]


@pytest.fixture(scope="module")
def found() -> Found:
    """All variants of all published models, by as many processes as there are cores: one alone takes minutes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    num_parts = len(os.sched_getaffinity(0))
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), "--part"]
    started = [
        subprocess.Popen([*command, f"{part}/{num_parts}"], stdout=subprocess.PIPE, text=True, env=environment)
        for part in range(num_parts)
    ]
    lines = [line for process in started for line in process.communicate()[0].splitlines()]
    assert all(process.returncode == 0 for process in started)
    return Found([json.loads(line) for line in lines])


def test_every_variant_compiles_and_fits(found: Found) -> None:
    assert {x["model"] for x in found.variants} == {*MODELS, MIXTURE}
    assert len(found.variants) >= 40 * len(MODELS)
    for x in found.variants:
        if (x["model"], x["kernel"]) == (WIDE, "_rope_write_kv"):  # a transform of 256 channels, once a row
            assert x["spills"] <= 14, x
        elif x["kernel"] != "_tables":  # exact sines of angles beyond 100,000 reduce them in local memory
            assert x["spills_in_loops"] <= SPILLS_IN_LOOPS.get(x["variant"], 0), x
            assert x["spills"] == 0 or x["variant"] in SPILLS_IN_LOOPS, x
        assert x["shared"] <= SHARED, x
        assert x["registers"] * x["warps"] * 32 <= REGISTERS, x
        assert x["raw_descriptors"] == x["overwritten_factors"] == 0, x


def test_decode_leaves_room_for_three_programs_side_by_side(found: Found) -> None:
    """Over int8 for two."""
    few = (x for x in found.of("_decode", "_attend") if x["variant"].startswith(("decode", "few rows")))
    decode = [x for x in few if not x["hgmma"]]  # those of the prompt beside them multiply in warp groups
    assert len(decode) >= 7 * len(MODELS)
    for x in decode:
        assert x["registers"] * x["warps"] * 32 <= REGISTERS // (2 if "int8" in x["variant"] else 3), x
        assert x["shared"] <= SHARED // 3, x


def test_two_programs_of_many_rows_fit_beside_each_other(found: Found) -> None:
    """One multiplies while the other does its softmax."""
    frames = found.of("_attend_tall")
    prompts = [x for x in found.of("_attend") if x["variant"] in ("prefill plain", SPILLING) and x["model"] != WIDE]
    assert len(frames) == len(MODELS)
    assert prompts
    for x in frames + prompts:
        assert x["registers"] * x["warps"] * 32 <= REGISTERS // 2, x
        assert x["shared"] + 1024 <= (SHARED + 1024) // 2, x


def test_scores_of_pictures_are_under_way_during_the_softmax(found: Found) -> None:
    """Of 68 exponentials in a round: products that ptxas does one by one, each with a wait, have none beside them."""
    frames = found.of("_attend_tall")
    assert {x["variant"] for x in frames} == {PICTURES}
    for x in frames:
        assert x["exponentials_beside_products"] >= 60, x
        assert x["tile_copies"] >= 8, x


def test_tall_tiles_multiply_in_warp_groups(found: Found) -> None:
    for model in MODELS:
        seen = {x["variant"] for x in found.variants if x["model"] == model and x["hgmma"]}
        assert seen.issuperset(PRODUCTS_OF_WARP_GROUPS), model


def test_many_rows_of_8_bit_floats_multiply_as_such(found: Found) -> None:
    products = [x for x in found.variants if x["variant"] == "fp8 product"]
    assert products
    assert all(x["qgmma"] for x in products), products


def test_tiles_of_few_rows_are_copied_as_a_whole_and_multiplied_by_warp_groups(found: Found) -> None:
    """By descriptors; factors of few bits come from registers."""
    products = [x for x in found.of("_multiply") if "bits" in x["variant"] or " rows" in x["variant"]]
    assert len(products) >= 26 * len(MODELS)
    for x in products:
        assert x["tile_copies"] >= 4, x
        assert x["hgmma"] + x["qgmma"] >= 4, x
        assert x["copies"] == 0 or "zeros" in x["variant"], x  # sums of x are copied beside


def test_experts_are_copied_as_a_whole_and_leave_room_for_other_programs(found: Found) -> None:
    """Rows come from anywhere, by 128 bits; but for many rows two programs fit beside each other, for few three."""
    products = found.of("_multiply_pairs")
    assert sum(bool(x["hgmma"]) for x in products) == 24
    assert sum(bool(x["qgmma"]) for x in products) == 12
    for x in products:
        assert x["tile_copies"] >= 3, x
        assert x["copies"] == x["wide_copies"] >= 3, x
        assert x["hgmma"] + x["qgmma"] >= 4, x
        fitting = {"few": 3, "some": 2}.get(x["variant"].split()[-2], 1)
        assert x["registers"] * x["warps"] * 32 <= REGISTERS // fitting, x
        assert x["shared"] + 1024 <= (SHARED + 1024) // fitting, x


def test_experts_of_a_row_by_itself_leave_room_for_four_programs(found: Found) -> None:
    alone = found.of("_gate_up_of_pair", "_down_of_row")
    assert len(alone) == 6
    for x in alone:
        assert x["registers"] <= 64, x
        assert x["shared"] <= 8 << 10, x


def test_a_row_by_itself_is_multiplied_by_reads_of_128_bits_that_precede_the_wait(found: Found) -> None:
    """Weights are under way before the last kernel has ended, those of three programs a multiprocessor."""
    rows = found.of("_row_times", "times_groups", "_floats")
    assert len(rows) >= 15 * len(MODELS)
    for x in rows:
        assert x["wide_reads_before_wait"] >= 4, x
        assert x["registers"] * x["warps"] * 32 <= REGISTERS // 3, x


def test_keys_and_values_are_copied_by_128_bits_beside_the_arithmetic(found: Found) -> None:
    """Those of 8 bits, too: their rows begin at multiples of 16 bytes."""
    attention = found.of("_decode", "_attend")
    assert attention
    for x in attention:
        assert x["wide_copies"] >= (8 if "int8" in x["variant"] else 12), x


def test_states_are_read_by_128_bits_and_leave_room_for_two_programs(found: Found) -> None:
    """And before the wait, where a kernel starts early: half of a memory of 64 KiB is under way in each of them."""
    rows = found.of("_one_row")
    assert rows
    for x in rows:
        assert x["registers"] * x["warps"] * 32 <= REGISTERS // 2, x
        assert x["wide_reads_before_wait"] >= 16, x


def test_chunks_of_prompts_multiply_in_warp_groups_and_are_copied_beside_it(found: Found) -> None:
    walks, prepared = found.of("_walk"), found.of("_prepare")
    assert walks
    assert prepared
    assert all(x["hgmma"] >= 28 and x["wide_copies"] >= 60 for x in walks), walks
    for x in prepared:
        assert x["hgmma"] >= 60, x
        assert x["registers"] * x["warps"] * 32 <= REGISTERS // 3, x


def test_tables_take_exact_sines(found: Found) -> None:
    """Angles reach tens of thousands, where the fast instruction has no digit left."""
    tables = found.of("_tables")
    assert tables
    assert all(x["fast_sines"] == 0 for x in tables), tables


def test_a_program_that_chooses_a_token_keeps_its_block_in_registers(found: Found) -> None:
    choosing = found.of("_choose")
    assert choosing
    for x in choosing:
        assert x["registers"] <= 128, x
        assert x["shared"] <= 40 << 10, x


def test_rows_take_few_registers(found: Found) -> None:
    for kernel in ("_rms_norm", "_layer_norm", "_silu_mul", "_quick_gelu", "_sigmoid_mul", "_combine", "_allowed",
                   "_shape", "_embed", "_choose_experts", "_sort", "_add_shares"):  # fmt: skip
        rows = [x for x in found.of(kernel) if not x["variant"].startswith("fp8")]  # those keep a whole row
        assert rows, kernel
        assert all(x["registers"] <= 64 for x in rows), rows
