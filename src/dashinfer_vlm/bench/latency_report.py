"""What a step takes, as a table per phase, as one JSON object, and as a section of the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from dashinfer_vlm import __version__
from dashinfer_vlm.bench.latency import LatencyBench, Limits, Phase
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.spans import Part

__all__ = ["latency_json", "latency_section", "latency_table", "latency_title"]

_UNITS = {"prefill": "prompt", "decode": "step", "encode": "picture"}
_HEADS = ("part", "ms", "share", "calls", "GB/s", "GFLOP/s")


def latency_title(phase: Phase) -> str:
    """The phase in one line."""
    return (
        f"{phase.name}: {phase.seconds * 1000:.1f} ms per {_UNITS[phase.name]} of {phase.num_tokens} tokens (median), "
        f"{phase.tokens_per_s:.1f} tokens/s"
    )


def latency_table(phase: Phase) -> Table:
    """The parts of one phase, as means."""
    shown = Table()
    for head in _HEADS:
        shown.add_column(head, justify="left" if head == "part" else "right")
    total_s = sum(part.seconds for part in phase.parts.values())
    for name, part in phase.parts.items():
        shown.add_row(*_cells(name, part, total_s))
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


def latency_section(result: Mapping[str, Any], facts: Sequence[str]) -> str:
    """Tables of what `latency_json` gave; `facts` are lines above them."""
    lines = [*facts]
    for found in result["phases"]:
        phase = Phase(**{**found, "parts": {name: Part(**part) for name, part in found["parts"].items()}})
        lines += ["", latency_title(phase)]
        if phase.parts:
            total_s = sum(part.seconds for part in phase.parts.values())
            lines += ["", f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
            lines += [f"| {' | '.join(_cells(name, part, total_s))} |" for name, part in phase.parts.items()]
    return "\n".join(lines)


def _cells(name: str, part: Part, total_s: float) -> tuple[str, ...]:
    return (
        name,
        f"{part.seconds * 1000:.2f}",
        f"{part.seconds / total_s:.1%}",
        f"{part.num_calls:.0f}",
        f"{part.num_bytes / part.seconds / 1e9:.1f}" if part.num_bytes else "",
        f"{part.num_flops / part.seconds / 1e9:.0f}" if part.num_flops else "",
    )
