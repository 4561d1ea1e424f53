"""A measurement as a picture: what a user waits for, as shares of all waits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dashinfer_vlm.bench.clients import Batch, Windows
from dashinfer_vlm.bench.config import ServeBench
from dashinfer_vlm.bench.events import Outcome, Reply
from dashinfer_vlm.bench.serve import Measured
from dashinfer_vlm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plot", "plot"]


def check_plot(file: Path) -> None:
    """Raise ConfigError when `file` could not be drawn, before anything is measured for it."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot is {file}; it must end in .png, .svg or .pdf")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot is {file}; there is no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install 'dashinfer-vlm[bench]'")


def plot(config: ServeBench, measured: Sequence[Measured], file: Path) -> None:
    """Write `file` (PNG, SVG or PDF by its name)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    first, gaps = figure.subplots(1, 2)
    for one in measured:
        _curves(one, first, gaps)
    figure.suptitle(f"{config.workload}: {config.clients} clients, {config.work().output_tokens} tokens out")
    _finish(first, "time to first token, s")
    _finish(gaps, "gap between tokens, s")
    figure.savefig(file)


def _curves(one: Measured, first: Axes, gaps: Axes) -> None:
    name = one.target.name
    batches = [r for r in one.rounds if isinstance(r, Batch)]
    windows = [r for r in one.rounds if isinstance(r, Windows)]
    if batches:
        outcomes = [outcome for batch in batches for outcome in batch.outcomes]
        _curve(first, name, _first_tokens(outcomes))
        _curve(gaps, name, _gaps(outcomes))
        return
    _curve(first, f"{name}, pictures", _first_tokens([o for w in windows for o in w.pictures.pictures]))
    _curve(gaps, f"{name}, words alone", _gaps([o for w in windows for o in w.plain.texts]))
    _curve(gaps, f"{name}, with pictures", _gaps([o for w in windows for o in w.pictures.texts]))


def _first_tokens(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.first_token_s for outcome in outcomes if isinstance(outcome, Reply)]


def _gaps(outcomes: Sequence[Outcome]) -> list[float]:
    return [gap for outcome in outcomes if isinstance(outcome, Reply) for gap in outcome.gaps_s]


def _curve(axes: Axes, label: str, values: Sequence[float]) -> None:
    if values:
        axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", label=label)


def _finish(axes: Axes, label: str) -> None:
    axes.set(xlabel=label, ylabel="share of all", ylim=(0, 1.02))
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
