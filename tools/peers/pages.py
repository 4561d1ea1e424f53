"""Measurements as tables of the documentation, between markers, so that a new run replaces the old figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from dashinfer_vlm.bench.breakdown import Breakdown
from dashinfer_vlm.bench.breakdown_report import (
    BREAKDOWN_HEADS,
    breakdown_rows,
    breakdown_title,
    waits_line,
)
from dashinfer_vlm.bench.latency import Phase
from dashinfer_vlm.bench.latency_report import PART_HEADS, latency_title, part_cells
from dashinfer_vlm.bench.spans import Part

__all__ = ["latency_section", "put", "serve_section"]

Run: TypeAlias = Mapping[str, Any]
"""A JSON object that `bench serve` or `bench latency` ends with."""

_BATCH_HEAD = (
    "| work | clients | server | requests/s | | tokens/s | first token, s | per token, ms | gap, ms | failed | GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
_WINDOW_HEAD = (
    "| clients | server | gap alone, ms | gap with pictures, ms | p99 ratio | text tokens alone | with pictures | kept "
    "| picture's first token, s | failed |\n|---|---|---|---|---|---|---|---|---|---|"
)


def put(page: str, name: str, text: str) -> str:
    """`page` with `text` between `<!-- name -->` and `<!-- /name -->`; raises ValueError without these markers."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"the page has no place called {name!r}; it needs the lines {begin.strip()} and {end}")
    return f"{before}{begin}{text.strip()}\n{end}{after}"


def serve_section(runs: Sequence[Run], facts: Sequence[str]) -> str:
    """Tables of `runs`, which were made on one machine; `facts` are lines above them."""
    batches = [run for run in runs if run["settings"]["workload"] != "mixed"]
    windows = [run for run in runs if run["settings"]["workload"] == "mixed"]
    lines = [*facts, ""]
    if batches:
        lines += [_BATCH_HEAD, *(row for run in batches for row in _batch_rows(run)), ""]
    lines += [line for run in runs for one in run["results"] for line in _breakdown(run["settings"], one)]
    for run in windows:
        settings = run["settings"]
        lines += [
            f"Streams of words for {settings['seconds']:g} s, then as long again while a new picture of "
            f"{_size(settings['image_sizes'][0])} pixels arrives every {settings['every']:g} s:",
            "",
            _WINDOW_HEAD,
            *_window_rows(run),
            "",
        ]
    return "\n".join(lines)


def _breakdown(settings: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """Where the time of a server went; nothing of one that does not tell."""
    if not one.get("breakdown"):
        return []
    found = msgspec.convert(one["breakdown"], Breakdown)
    name = f"`{settings['workload']}`, {settings['clients']} clients, {one['name']}"
    bar = BREAKDOWN_HEADS.index("of the whole time")
    rows = (
        _row(f"`{cell}`" if i == bar and cell.strip() else cell for i, cell in enumerate(row))
        for row in breakdown_rows(found)
    )
    return [
        breakdown_title(name, found),
        "",
        _row(BREAKDOWN_HEADS),
        "|---" * len(BREAKDOWN_HEADS) + "|",
        *rows,
        "",
        waits_line(found),
        "",
    ]


def latency_section(result: Run, facts: Sequence[str]) -> str:
    """Tables of a JSON object of `bench latency`; `facts` are lines above them."""
    lines = [*facts]
    for found in result["phases"]:
        phase = Phase(**{**found, "parts": {name: Part(**part) for name, part in found["parts"].items()}})
        lines += ["", latency_title(phase)]
        if phase.parts:
            total_s = sum(part.seconds for part in phase.parts.values())
            lines += ["", f"| {' | '.join(PART_HEADS)} |", "|---" * len(PART_HEADS) + "|"]
            lines += [f"| {' | '.join(part_cells(name, part, total_s))} |" for name, part in phase.parts.items()]
    return "\n".join(lines)


def _batch_rows(run: Run) -> list[str]:
    settings, last = run["settings"], run["results"][-1]["name"]
    rows = []
    for one in run["results"]:
        ratio = run["ratios"].get(one["name"], {}).get(last)
        memory = one["peak_memory_bytes"]
        cells = (
            settings["workload"],
            settings["clients"],
            one["name"],
            _spread(one["requests_per_s"], 3),
            f"**{ratio:.2f}x**" if ratio else "",
            _spread(one["output_tokens_per_s"], 1),
            _percentiles(one["first_token_s"], 1, 2),
            _percentiles(one["per_token_s"], 1000, 0),
            _percentiles(one["gap_s"], 1000, 0),
            one["failures"]["num"],
            f"{memory / 2**30:.1f}" if memory else "",
        )
        rows.append(_row(cells))
    return rows


def _window_rows(run: Run) -> list[str]:
    return [
        _row(
            (
                run["settings"]["clients"],
                one["name"],
                _percentiles(one["gap_plain_s"], 1000, 0),
                _percentiles(one["gap_pictures_s"], 1000, 0),
                f"{one['gap_ratio']:.2f}" if one["gap_ratio"] else "-",
                _spread(one["tokens_plain"], 0),
                _spread(one["tokens_pictures"], 0),
                f"{one['tokens_kept']:.0%}",
                _percentiles(one["picture_first_token_s"], 1, 2),
                one["failures"]["num"],
            )
        )
        for one in run["results"]
    ]


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _spread(spread: Mapping[str, float], digits: int) -> str:
    middle, least, most = (f"{spread[name]:.{digits}f}" for name in ("median", "least", "most"))
    return middle if least == most else f"{middle} ({least} to {most})"


def _percentiles(found: Mapping[str, float] | None, factor: float, digits: int) -> str:
    if found is None:
        return "-"
    return " / ".join(f"{factor * found[name]:.{digits}f}" for name in ("p50", "p90", "p99"))


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
