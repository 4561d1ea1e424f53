"""Where the time goes as a picture of bars, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from dashinfer_vlm.bench.breakdown import Breakdown, TimePart
from dashinfer_vlm.bench.serve import Measured

__all__ = ["BREAKDOWN_HEADS", "breakdown_rows", "breakdown_title", "show_breakdown", "waits_line"]

BREAKDOWN_HEADS = ("part", "s per request", "share", "of the whole time", "steps", "ms per step", "floor, s")
_BAR = 40
"""Characters that stand for the whole time."""
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def show_breakdown(console: Console, one: Measured) -> None:
    """A table with bars, or why there is none; nothing where none was asked for."""
    if one.no_breakdown:
        console.print(f"no breakdown: {one.no_breakdown}", markup=False)
    if one.breakdown is not None:
        console.print(breakdown_title(one.target.name, one.breakdown), markup=False)
        console.print(_table(one.breakdown))
        console.print(waits_line(one.breakdown), markup=False)


def breakdown_title(name: str, found: Breakdown) -> str:
    """Requests, time and the floor in one line."""
    requests = found.num_requests
    title = f"{name}: {requests} requests in {found.wall_s:.1f} s, {requests / found.wall_s:.3f}/s"
    if found.floor is None or found.share_of_floor is None:
        return f"{title}; no floor: it needs the model's folder on this machine, and a processor that computes"
    rates = found.floor.rates
    products = ", ".join(f"{rate:.0f} G/s ({numbers})" for numbers, rate in sorted(rates.gflop_s.items()))
    return (
        f"{title}, {found.share_of_floor:.0%} of the floor's {requests / found.floor.seconds:.3f}/s: products at "
        f"{products}, weights read at {rates.read_gb_s:.1f} GB/s"
    )


def breakdown_rows(found: Breakdown) -> Iterator[tuple[str, ...]]:
    """Below `BREAKDOWN_HEADS`; each bar begins where the one above it ends."""
    before_s = 0.0
    for part in found.parts:
        yield _row(part.name, part, found, before_s)
        inner_s = before_s
        for streams in part.streams:
            yield _row(f"… of {streams.name} stream{'s' * (streams.name != '1')}", streams, found, inner_s)
            inner_s += streams.seconds
        before_s += part.seconds


def waits_line(found: Breakdown) -> str:
    """The mean time in each stage; stages of several requests overlap, and `encode` lies within `prefill`."""
    waits = (f"{stage} {wait.mean_s:.3f} s" for stage, wait in found.waits.items())
    return f"Stages of an item or an answer, mean: {', '.join(waits)}."


def _table(found: Breakdown) -> Table:
    shown = Table()
    for i, head in enumerate(BREAKDOWN_HEADS):
        shown.add_column(head, justify="left" if i in (0, 3) else "right", no_wrap=True)
    for row in breakdown_rows(found):
        shown.add_row(*row)
    return shown


def _row(name: str, part: TimePart, found: Breakdown, before_s: float) -> tuple[str, ...]:
    requests, steps = max(found.num_requests, 1), part.num_steps
    return (
        name,
        f"{part.seconds / requests:.3f}",
        f"{part.seconds / found.wall_s:.1%}",
        _bar(before_s / found.wall_s, part.seconds / found.wall_s),
        "" if steps is None else str(steps),
        f"{1000 * part.seconds / steps:.1f}" if steps else "",
        "" if part.floor_s is None else f"{part.floor_s / requests:.3f}",
    )


def _bar(begin: float, length: float) -> str:
    """Both as shares of the whole; at least a hair where there is anything."""
    whole, rest = divmod(round(8 * _BAR * min(length, 1.0)), 8)
    bar = "█" * whole + _EIGHTHS[rest]
    return " " * round(_BAR * begin) + (bar or ("▏" if length > 0 else ""))
