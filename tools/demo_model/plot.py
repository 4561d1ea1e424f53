"""Draw the loss and the held-out accuracy of both stages from their logs; safe to run while they train.

PYTHONPATH=tools python tools/demo_model/plot.py build/demo_model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def smoothed(values: list[float], window: int = 15) -> list[float]:
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def draw_vision(axis: Axes, rows: list[dict[str, Any]]) -> None:
    checked = [row for row in rows if "held_shape" in row]
    for name in ("shape", "colour", "centre", "row", "char"):
        axis.plot([row["step"] for row in checked], [row[f"held_{name}"] for row in checked], label=name)
    axis.set(title="vision stage: seen right in held-out cells", xlabel="step", ylim=(0, 1))
    axis.legend()


def draw_answers(axis: Axes, rows: list[dict[str, Any]]) -> None:
    checked = [row for row in rows if "held_out" in row]
    for i, task in enumerate(sorted({task for row in checked for task in row["held_out"]})):
        points = [(row["step"], row["held_out"][task]) for row in checked if task in row["held_out"]]
        axis.plot(*zip(*points, strict=True), label=task, linestyle="-" if i < 6 else "--")
    axis.set(title="exact answers, held out", xlabel="step", ylim=(0, 1))
    if checked:
        axis.legend(ncols=2, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seen, told = rows_of(args.folder / "vision.jsonl"), rows_of(args.folder / "train.jsonl")
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.4), layout="constrained")
    axes[0].plot([row["step"] for row in seen], smoothed([row["loss"] for row in seen]), label="vision stage")
    axes[0].plot([row["step"] for row in told], smoothed([row["loss"] for row in told]), label="answers")
    axes[0].set(title="loss, mean of 15 lines", xlabel="step", yscale="log")
    axes[0].legend()
    draw_vision(axes[1], seen)
    draw_answers(axes[2], told)
    figure.savefig(args.out or args.folder / "training.png", dpi=80)


if __name__ == "__main__":
    main()
