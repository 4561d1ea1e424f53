"""What a step takes, as a table per phase and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from dashinfer_vlm import __version__
from dashinfer_vlm.bench.latency import LatencyBench, Limits, Phase
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.spans import Part

__all__ = ["PART_HEADS", "latency_json", "latency_table", "latency_title", "part_cells"]

_UNITS = {"prefill": "prompt", "decode": "step", "encode": "picture"}
PART_HEADS = ("part", "ms", "share", "calls", "GB/s", "GFLOP/s")


def latency_title(phase: Phase) -> str:
    """The phase in one line."""
    return (
        f"{phase.name}: {phase.seconds * 1000:.1f} ms per {_UNITS[phase.name]} of {phase.num_tokens} tokens (median), "
        f"{phase.tokens_per_s:.1f} tokens/s"
    )


def latency_table(phase: Phase) -> Table:
    """The parts of one phase, as means."""
    shown = Table()
    for head in PART_HEADS:
        shown.add_column(head, justify="left" if head == "part" else "right")
    total_s = sum(part.seconds for part in phase.parts.values())
    for name, part in phase.parts.items():
        shown.add_row(*part_cells(name, part, total_s))
    return shown


def latency_json(config: LatencyBench, machine: Machine, limits: Limits, phases: Sequence[Phase]) -> dict[str, Any]:
    """Times in seconds; parts are means per step, prompt or picture."""
    settings = {**asdict(config), "engine": asdict(config.engine)}
    return {
        "bench": "latency",
        "version": __version__,
        "machine": asdict(machine),
        "limits": asdict(limits),
        "settings": settings,
        "phases": [asdict(phase) for phase in phases],
    }


def part_cells(name: str, part: Part, total_s: float) -> tuple[str, ...]:
    """A row below `PART_HEADS`; `total_s` is what all parts took."""
    return (
        name,
        f"{part.seconds * 1000:.2f}",
        f"{part.seconds / total_s:.1%}",
        f"{part.num_calls:.0f}",
        f"{part.num_bytes / part.seconds / 1e9:.1f}" if part.num_bytes else "",
        f"{part.num_flops / part.seconds / 1e9:.0f}" if part.num_flops else "",
    )
