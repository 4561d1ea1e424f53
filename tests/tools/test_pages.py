"""The tables of the documentation are written between markers, from the JSON of the runs alone."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dashinfer_vlm.bench.breakdown import Breakdown, TimePart, Wait
from dashinfer_vlm.bench.clients import Batch, Window, Windows
from dashinfer_vlm.bench.config import ServeBench
from dashinfer_vlm.bench.events import Failure, Reply
from dashinfer_vlm.bench.floor import Floor, Rates
from dashinfer_vlm.bench.latency import LatencyBench, Limits, Phase
from dashinfer_vlm.bench.latency_report import latency_json
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.report import as_json
from dashinfer_vlm.bench.serve import Measured
from dashinfer_vlm.bench.spans import Part
from dashinfer_vlm.bench.target import Target
from dashinfer_vlm.config import EngineConfig
from peers.pages import latency_section, put, serve_section
from tests.conftest import ROOT

OURS, PEER = Target("ours", "http://a/v1"), Target("peer", "http://b/v1")


def as_read(config: ServeBench, measured: list[Measured]) -> dict[str, Any]:
    result = json.loads(json.dumps(as_json(config, Machine.here(), measured)))
    assert isinstance(result, dict)
    return result


def test_a_row_tells_rates_with_their_spread_and_the_ratio_over_the_last_target() -> None:
    reply = Reply(0.0, (0.5, 0.6, 0.7), 0.7, 7, 3)
    fast = Measured(OURS, [Batch((reply, reply), 1.0), Batch((reply, reply), 2.0)], 3 * 2**30)
    slow = Measured(PEER, [Batch((reply, Failure(0.0, 1.0, "no room")), 2.0)])
    config = ServeBench(targets=(OURS, PEER), workload="text", clients=2)

    section = serve_section([as_read(config, [fast, slow])], ["Machine: one."])

    assert section.startswith("Machine: one.\n\n| work |")
    assert (
        "| text | 2 | ours | 1.500 (1.000 to 2.000) | **3.00x** | 4.5 (3.0 to 6.0) | 0.50 / 0.50 / 0.50 "
        "| 100 / 100 / 100 | 100 / 100 / 100 | 0 | 3.0 |"
    ) in section
    assert "| text | 2 | peer | 0.500 |  | 1.5 | 0.50 / 0.50 / 0.50 |" in section
    assert section.rstrip().endswith("| 1 |  |")


def test_a_breakdown_is_a_table_with_bars_under_the_rates() -> None:
    parts = (
        TimePart("prompts", 6.0, None, 3.0),
        TimePart("host", 0.01),
        TimePart("decode", 4.0, 8, 1.0, (TimePart("2", 4.0, 8),)),
    )
    floor = Floor(0.0, 3.0, 1.0, Rates(30.0, {"int8": 800.0}))
    found = Breakdown(10.0, 2, parts, {"prefill": Wait(2, 1.25)}, floor)
    ours = Measured(OURS, [Batch((Reply(0.0, (0.5, 0.6), 0.7, 7, 2),), 10.0)], breakdown=found)
    config = ServeBench(targets=(OURS,), workload="text", clients=2, breakdown=True)

    section = serve_section([as_read(config, [ours])], [])

    assert (
        "`text`, 2 clients, ours: 2 requests in 10.0 s, 0.200/s, 40% of the floor's 0.500/s: "
        "products at 800 G/s (int8), weights read at 30.0 GB/s"
    ) in section
    assert f"| prompts | 3.000 | 60.0% | `{'█' * 24}` |  |  | 1.500 |" in section
    assert f"| … of 2 streams | 2.000 | 40.0% | `{' ' * 24}{'█' * 16}` | 8 | 500.0 |  |" in section
    assert f"| host | 0.005 | 0.1% | `{' ' * 24}▏` |  |  |  |" in section
    assert "Stages of an item or an answer, mean: prefill 1.250 s." in section


def test_windows_have_a_table_of_their_own() -> None:
    window = Window(0.0, 10.0, (Reply(0.0, (1.0, 1.2, 1.4), 1.4, 7, 3),), (Reply(2.0, (4.5, 5.0), 5.0, 7, 2),))
    config = ServeBench(targets=(OURS,), workload="mixed", clients=4, seconds=10, every=5)

    section = serve_section([as_read(config, [Measured(OURS, [Windows(window, window)])])], [])

    assert "picture of 896x896 pixels arrives every 5 s" in section
    assert "| 4 | ours | 200 / 200 / 200 | 200 / 200 / 200 | 1.00 | 3 | 3 | 100% | 2.50 / 2.50 / 2.50 | 0 |" in section
    assert "| work |" not in section


def test_every_phase_of_a_step_has_a_table_of_its_parts() -> None:
    parts = {"linear 8x4": Part(0.003, 2e6, 6e6, 4), "sampling": Part(0.001, 0, 0, 1)}
    phases = [Phase("prefill", 8, 0.004, parts), Phase("decode", 1, 0.5, {})]
    result = latency_json(LatencyBench(engine=EngineConfig(model="x")), Machine.here(), Limits(1.0, 2.0), phases)

    assert latency_section(json.loads(json.dumps(result)), ["Machine: one."]) == (
        "Machine: one.\n"
        "\n"
        "prefill: 4.0 ms per prompt of 8 tokens (median), 2000.0 tokens/s\n"
        "\n"
        "| part | ms | share | calls | GB/s | GFLOP/s |\n"
        "|---|---|---|---|---|---|\n"
        "| linear 8x4 | 3.00 | 75.0% | 4 | 0.7 | 2 |\n"
        "| sampling | 1.00 | 25.0% | 1 |  |  |\n"
        "\n"
        "decode: 500.0 ms per step of 1 tokens (median), 2.0 tokens/s"
    )


def test_new_tables_replace_the_old_ones_and_nothing_else() -> None:
    page = "# A\n<!-- x -->\nold\n<!-- /x -->\nkept\n<!-- y -->\nalso kept\n<!-- /y -->\n"

    assert put(page, "x", "\nnew\n\n") == page.replace("old", "new")
    assert put(put(page, "x", "new"), "x", "old") == page


def test_a_page_without_the_place_is_left_alone() -> None:
    with pytest.raises(ValueError, match="no place called 'z'"):
        put("# A\n", "z", "new")


def test_every_marker_of_the_documentation_is_closed() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    names = re.findall(r"<!-- ([\w-]+) -->", page)

    assert names
    for name in names:
        put(page, name, "new")
