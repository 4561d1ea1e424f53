#!/usr/bin/env python3
"""Everything about a card in one command of at most eight minutes, without a network and without a checkpoint.

    python tools/gpu_check.py [--only PHASE]... [--out FILE]
    python tools/gpu_check.py --device cpu --tiny        # a rehearsal on any machine

Prints a table: name, milliseconds, floor, ratio, bar, error, verdict. The floor is what the ceilings that the first
phase measured allow. `--out` gets a line of JSON per result as soon as it is there. The exit status is 1 when a result
is wrong; one that is only slow is 0. docs/cuda.md says more.

The checks run in a process of their own. Where it dies, hangs, or loses the card, that is a result, and another process
goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from card_checks.rows import Row, failure, table

TOTAL_S = 460.0
"""After which no check begins."""
START_S, HANG_S = 60.0, 120.0
"""For which a process that is alive may say nothing: at first, and later."""
REHEARSAL_S = 3600.0
"""In place of all three in a rehearsal, which takes as long as it takes."""
PHASES: dict[str, tuple[str, float]] = {
    "ceilings": ("device.ceilings", 15),
    "compile": ("device.compile_all", 60),
    "kernels": ("kernels.check", 60),
    "families": ("families.families", 110),
    "steps": ("steps.steps", 60),
    "profile": ("profiles.profiles", 30),
    "serving": ("profiles.serving", 20),
    "memory": ("lending.memory", 20),
    "ranks": ("ranks.ranks", 40),
    "shapes": ("shapes.shapes", 100),
    "published": ("service.published", 70),
    "products": ("products.products", 30),
    "timed": ("kernels.measure", 45),
    "tiles": ("tiles.tiles", 30),
    "beside": ("service.beside", 40),
    "peer": ("peer.peer", 40),
}
"""What is done, what is worth most first, and the seconds after which no further check of it begins, but in a
rehearsal."""

ROOT = Path(__file__).resolve().parents[1]

Command = Callable[[list[tuple[str, str, float, list[str]]], float], list[str]]
"""The process that does the rest: phases as `card_checks.worker` takes them, and seconds."""


@dataclass(slots=True)
class Watch:
    """Starts processes until all phases are done, and collects what they find."""

    command: Command
    phases: list[str]
    out: TextIO | None = None
    total_s: float = TOTAL_S
    hang_s: float = HANG_S
    found: dict[tuple[str, str], Row] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)
    _given_up: set[str] = field(default_factory=set)
    _current: tuple[str, str] = ("", "")

    def run(self) -> list[Row]:
        stop = time.monotonic() + self.total_s
        while (left := self._left()) and time.monotonic() < stop:
            before = len(self.found)
            self._current = (left[0], "start")
            status = self._watch_one(self.command([self._told(phase) for phase in left], stop - time.monotonic()))
            if status == 0:
                break
            self._note(*self._current, failure(self._current[1], f"its process ended with status {status}"))
            if len(self.found) == before:  # it fails at the same place again
                self._given_up.add(self._current[0])
        return list(self.found.values())

    def _left(self) -> list[str]:
        """What is to be done, and before it the ceilings again: every process needs them."""
        left = [phase for phase in self.phases if phase not in self._ended | self._given_up]
        again = left and "ceilings" in self._ended - self._given_up
        return ["ceilings", *left] if again else left

    def _told(self, phase: str) -> tuple[str, str, float, list[str]]:
        done = [] if phase == "ceilings" else [name for of, name in self.found if of == phase]
        return (phase, *PHASES[phase], done)

    def _watch_one(self, command: list[str]) -> int:
        """Exit status of a process that has been watched until its end."""
        path = [str(ROOT / "src"), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines))
        reader.start()
        patience_s = max(self.hang_s, START_S)
        try:
            while (line := lines.get(timeout=patience_s)) is not None:
                self._hear(json.loads(line))
                patience_s = self.hang_s
        except queue.Empty:
            process.kill()
        status = process.wait()
        reader.join()
        return status

    def _hear(self, message: dict[str, Any]) -> None:
        phase = message["phase"]
        if "begins" in message:
            self._current = (phase, message["begins"])
        elif "row" in message:
            self._note(phase, message["row"]["name"], Row(**message["row"]))
            self._current = (phase, "what follows")
        else:
            self._ended.add(phase)

    def _note(self, phase: str, name: str, row: Row) -> None:
        if (phase, name) in self.found:
            return
        self.found[phase, name] = row
        print(f"  {phase}: {row.name}: {row.verdict} {row.note[:200]}", file=sys.stderr, flush=True)
        if self.out is not None:
            told = asdict(row) | {"ratio": row.ratio, "verdict": row.verdict}
            print(json.dumps({"phase": phase, "row": told}), file=self.out, flush=True)


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def worker(device: str, tiny: bool) -> Command:
    def command(phases: list[tuple[str, str, float, list[str]]], seconds: float) -> list[str]:
        told = [json.dumps(phases), "--device", device, "--seconds", str(seconds)]
        return [sys.executable, "-m", "card_checks.worker", *told, *(["--tiny"] if tiny else [])]

    return command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--only", action="append", choices=PHASES, help="a phase; the ceilings always come first")
    parser.add_argument("--out", type=Path, help="file that gets a line of JSON per result")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    phases = ["ceilings", *(name for name in options.only or PHASES if name != "ceilings")]
    out = None if options.out is None else options.out.open("a")
    total_s, hang_s = (REHEARSAL_S, REHEARSAL_S) if options.tiny else (TOTAL_S, HANG_S)
    rows = Watch(worker(options.device, options.tiny), phases, out, total_s, hang_s).run()
    print(table(rows))
    return int(any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
