"""A measurement as a table for people and as one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from rich.table import Table

from dashinfer_vlm import __version__
from dashinfer_vlm.bench.config import ServeBench
from dashinfer_vlm.bench.figures import BatchFigures, Percentiles, Spread, WindowFigures
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.serve import Measured

__all__ = ["as_json", "table"]

_Cells: TypeAlias = tuple[tuple[str, str], ...]
"""Heading and cell."""


def as_json(config: ServeBench, machine: Machine, measured: Sequence[Measured]) -> dict[str, Any]:
    """Everything that is needed to repeat and to compare: settings without the key, machine, figures per target.

    Times are in seconds, sizes in bytes.
    """
    settings = asdict(config)
    del settings["api_key"], settings["targets"], settings["pids"]
    settings |= {"warmup": config.num_warmup, "output_tokens": config.work().output_tokens}
    settings["image_sizes"] = config.work().workload.image_sizes
    del settings["image_size"]
    results = [
        {**asdict(one.target), **asdict(one.figures()), "breakdown": one.breakdown and one.breakdown.as_json()}
        for one in measured
    ]
    return {
        "bench": "serve",
        "version": __version__,
        "machine": asdict(machine),
        "settings": settings,
        "results": results,
        "ratios": _ratios(measured),
    }


def table(config: ServeBench, measured: Sequence[Measured]) -> Table:
    """One row per target."""
    work = config.work()
    title = f"{config.workload}: {work.workload.summary}; {config.clients} clients, {work.output_tokens} tokens out"
    shown = Table(title=title, title_justify="left", caption="seconds as p50 / p90 / p99", caption_justify="left")
    rows = [_cells(one) for one in measured]
    for head, _ in rows[0]:
        shown.add_column(head, justify="left" if head == "target" else "right")
    for row in rows:
        shown.add_row(*(cell for _, cell in row))
    return shown


def _cells(one: Measured) -> _Cells:
    figures = one.figures()
    own = _batch_cells(figures) if isinstance(figures, BatchFigures) else _window_cells(figures)
    memory = figures.peak_memory_bytes
    return (
        ("target", one.target.name),
        *own,
        ("failed", str(figures.failures.num)),
        ("memory GiB", "" if memory is None else f"{memory / 2**30:.2f}"),
    )


def _batch_cells(figures: BatchFigures) -> _Cells:
    return (
        ("requests/s", _spread(figures.requests_per_s, 3)),
        ("tokens/s", _spread(figures.output_tokens_per_s, 1)),
        ("first token", _seconds(figures.first_token_s)),
        ("per token", _seconds(figures.per_token_s)),
        ("gap", _seconds(figures.gap_s)),
        ("replies", str(figures.num_replies)),
    )


def _window_cells(figures: WindowFigures) -> _Cells:
    return (
        ("gap alone", _seconds(figures.gap_plain_s)),
        ("gap with pictures", _seconds(figures.gap_pictures_s)),
        ("p99 ratio", "-" if figures.gap_ratio is None else f"{figures.gap_ratio:.2f}"),
        ("tokens alone", _spread(figures.tokens_plain, 0)),
        ("with pictures", _spread(figures.tokens_pictures, 0)),
        ("kept", f"{figures.tokens_kept:.0%}"),
        ("picture's first token", _seconds(figures.picture_first_token_s)),
        ("pictures", str(figures.num_pictures)),
    )


def _spread(spread: Spread, digits: int) -> str:
    middle, least, most = (f"{value:.{digits}f}" for value in (spread.median, spread.least, spread.most))
    return middle if least == most else f"{middle} ({least} to {most})"


def _seconds(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return "-"
    values = (percentiles.p50, percentiles.p90, percentiles.p99)
    digits = 3 if values[0] < 1 else 2
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _ratios(measured: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Each target over the last one: requests/s, or tokens with pictures; a rate of 0 there gives no ratio."""
    rates = {one.target.name: _rate(one.figures()) for one in measured}
    *others, last = rates
    return {name: {last: rates[name] / rates[last]} for name in others if rates[last]}


def _rate(figures: BatchFigures | WindowFigures) -> float:
    if isinstance(figures, BatchFigures):
        return figures.requests_per_s.median
    return figures.tokens_pictures.median
