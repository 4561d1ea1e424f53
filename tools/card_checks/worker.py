"""Does the checks: `python -m card_checks.worker`, started by `gpu_check.py` and by nobody else.

A line of JSON on standard output announces each check, and another one tells what it found. What fails is told and the
next check begins; a card that answers no more (a fault within a kernel ends a process's use of it) ends this process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from card_checks.results import Check, Setting
from card_checks.rows import Row, failure

Tell = Callable[[dict[str, Any]], None]
LOST = 3
"""Exit status of a process that has lost the card."""


class CardLostError(Exception):
    """The card answers no more."""


def run_phase(checks: Iterator[Check], setting: Setting, tell: Tell, stop: float, done: frozenset[str]) -> None:
    """All checks but those that are `done`, as far as time allows; until `stop`, of `time.monotonic`, one may begin.
    Raises CardLostError when the card is no longer of use."""
    while True:
        try:
            name, check = next(checks)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - what the following checks need cannot be had
            tell(_told(_failed("preparation", error)))
            _look_after(setting)
            return
        if name in done:
            continue
        if time.monotonic() > stop:
            tell(_told(Row(name="out of time", note=f"left out from {name!r} on")))
            return
        tell({"begins": name})
        tell(_told(_run(name, check, setting)))
        _look_after(setting)


def _run(name: str, check: Callable[[], Row], setting: Setting) -> Row:
    try:
        row = replace(check(), name=name)
    except Exception as error:  # noqa: BLE001 - whatever fails is a result
        return _failed(name, error)
    return replace(row, bar=None) if setting.tiny else row  # nothing is measured in a rehearsal


def _failed(name: str, error: Exception) -> Row:
    traceback.print_exception(error)
    return failure(name, f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}")


def _look_after(setting: Setting) -> None:
    try:
        setting.wait()
    except RuntimeError as error:
        raise CardLostError from error


def _told(row: Row) -> dict[str, Any]:
    return {"row": asdict(row)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("phases", help="JSON: [[phase, function, seconds, names of what is done], ...]")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, required=True, help="in which checks may begin")
    options = parser.parse_args()
    out, end = os.fdopen(os.dup(1), "w"), time.monotonic() + options.seconds
    os.dup2(2, 1)  # what libraries print is no message
    setting = Setting(torch.device(options.device), options.tiny)
    if options.device == "cpu":
        import quick_interpreter  # imports triton

        quick_interpreter.leave_out_what_is_in_vain()
    for phase, function, seconds, done in json.loads(options.phases):

        def tell(message: dict[str, Any], phase: str = phase) -> None:
            print(json.dumps({"phase": phase} | message), file=out, flush=True)

        module, name = function.split(".")
        stop = float("inf") if options.tiny else min(end, time.monotonic() + seconds)
        try:
            with torch.inference_mode():
                checks = getattr(importlib.import_module(f"card_checks.{module}"), name)(setting)
                run_phase(checks, setting, tell, stop, frozenset(done))
        except CardLostError:
            return LOST
        tell({"ends": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
