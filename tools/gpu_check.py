#!/usr/bin/env python3
"""Everything about a card in one command of at most eight minutes, without a network and without a checkpoint.

    PYTHONPATH=src:tools python tools/gpu_check.py [--only PHASE]... [--out FILE]
    PYTHONPATH=src:tools python tools/gpu_check.py --device cpu --tiny        # a rehearsal on any machine

Prints a table: name, milliseconds, floor, ratio, bar, error, verdict. The floor is what the ceilings that the first
phase measured allow. `--out` gets a line of JSON per phase as it ends. The exit status is 1 when a result is wrong; one
that is only slow is 0. docs/cuda.md says more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from card_checks import device, kernels, models, peer, service, steps
from card_checks.results import Row, Setting, table

TOTAL_S = 470
Phase = Callable[[Setting], Iterator[Row]]
PHASES: dict[str, tuple[Phase, float]] = {
    "ceilings": (device.ceilings, 15),
    "compile": (device.compile_all, 45),
    "kernels": (kernels.check, 60),
    "families": (models.families, 60),
    "timed": (kernels.measure, 80),
    "shapes": (models.shapes, 110),
    "steps": (steps.steps, 60),
    "published": (service.published, 70),
    "beside": (service.beside, 30),
    "peer": (peer.peer, 40),
}
"""What is done, and the seconds after which no further row of it begins, but in a rehearsal."""


def run_phase(name: str, setting: Setting, stop: float) -> list[Row]:
    """Its rows, as far as time allows; what goes wrong is a row too, and the other phases go on."""
    phase, limit_s = PHASES[name]
    rows: list[Row] = []
    stop = math.inf if setting.tiny else min(stop, time.monotonic() + limit_s)
    try:
        for row in phase(setting):
            row = replace(row, bar=None) if setting.tiny else row  # nothing is measured
            rows.append(row)
            print(f"  {row.name}: {row.verdict} {row.note}", file=sys.stderr, flush=True)
            if time.monotonic() > stop:
                rows.append(Row(f"{name}: out of time", note="what would have followed was left out"))
                break
    except Exception as found:  # noqa: BLE001 - whatever fails is a result
        traceback.print_exc()
        rows.append(Row(f"{name}: {type(found).__name__}", error=float("nan"), allowed=0, note=str(found)[:200]))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--only", action="append", choices=PHASES, help="a phase; the ceilings always come first")
    parser.add_argument("--out", type=Path, help="file that gets a line of JSON per phase")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    setting = Setting(torch.device(options.device), options.tiny)
    begin = time.monotonic()
    rows: list[Row] = []
    with torch.inference_mode():
        for name in ("ceilings", *(name for name in options.only or PHASES if name != "ceilings")):
            started = time.monotonic()
            found = run_phase(name, setting, begin + TOTAL_S)
            rows += found
            if options.out is not None:
                told = [asdict(row) | {"ratio": row.ratio, "verdict": row.verdict} for row in found]
                line = {"phase": name, "seconds": time.monotonic() - started, "rows": told}
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(table(rows))
    return int(any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
