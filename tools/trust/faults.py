"""Something breaks under fifty running streams: what every client saw, as a table.

    python tools/trust/faults.py --page docs/reliability.md

A tiny random model behind the real command, once for each fault. Ends with status 1 where a client hangs, where a
process or a file in shared memory is left behind, and where a fault costs more than its row allows. Folders that are
full or cannot be written need `unshare` (as root, or where users may have namespaces), the clock needs libfaketime.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import rich_click as click
from tests.e2e.serving import Server, run_to_end

from dashinfer_vlm.cli.command import CONTEXT
from trust.page import write_section
from trust.server import model_folder, serving
from trust.stage import ENGINE, MEDIA, VISION, Seen, Stage, Strike, told
from trust.vitals import shared_folders

FLAGS = "--kv-cache-gib 0.2 --max-model-len 4096 --threads 1 --vision-workers 1".split()
FAKETIME = Path(f"/usr/lib/{os.uname().machine}-linux-gnu/faketime/libfaketimeMT.so.1")
GONE_S = 15.0
"""Processes that a server leaves end within this."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What breaks, and what that may cost."""

    strike: Strike
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[str, ...] = ()
    """Arguments of `mount`, in a namespace of the server's own."""
    spares_streams: bool = True
    told_within_s: float = 1.0
    """How late a stream that the fault ends may be told."""
    comes_back: bool = True
    spares_later: bool = True
    """Whoever comes after the fault is served at once."""


def send(number: signal.Signals, module: str) -> Strike:
    return lambda stage: os.kill(stage.find(module), number)


def nothing(stage: Stage) -> None:
    """It was broken from the start."""


def kill_server(stage: Stage) -> None:
    os.kill(stage.tree.pid, signal.SIGKILL)


def move_clock(stage: Stage) -> None:
    """An hour forth, then a day back."""
    file = Path(os.environ["TRUST_CLOCK"])
    for offset in ("+3600", "-86400"):
        file.write_text(offset)
        time.sleep(1)


FOLDER = Path(tempfile.gettempdir()) / "trust"
FULL, HOME = FOLDER / "full", FOLDER / "home"
CLOCK = FOLDER / "clock"
TINY = ("-t", "tmpfs", "-o", "size=256k", "none")

FAULTS = {
    "engine killed": Fault(send(signal.SIGKILL, ENGINE), spares_streams=False, spares_later=False),
    "engine stopped (SIGSTOP)": Fault(
        send(signal.SIGSTOP, ENGINE), spares_streams=False, told_within_s=15, spares_later=False
    ),
    "decoding process killed": Fault(send(signal.SIGKILL, MEDIA)),
    "vision worker killed": Fault(send(signal.SIGKILL, VISION)),
    "vision worker stopped (SIGSTOP)": Fault(send(signal.SIGSTOP, VISION)),
    "HTTP process killed": Fault(kill_server, spares_streams=False, comes_back=False),
    "disk of the quantised weights full": Fault(
        nothing,
        flags=("--quant-type", "a8w8", "--quant-cache", str(FULL)),
        mounts=(*TINY, str(FULL)),
    ),
    "disk of the stored responses full": Fault(
        nothing, flags=("--responses-store", str(FULL / "responses")), mounts=(*TINY, str(FULL))
    ),
    "shared memory of 4 MiB": Fault(
        nothing,
        mounts=("-t", "tmpfs", "-o", "size=4m", "none", "/dev/shm"),
        spares_streams=False,
        spares_later=False,
    ),
    "home that cannot be written": Fault(
        nothing,
        flags=("--quant-type", "a8w8"),
        env={"HOME": str(HOME), "XDG_CACHE_HOME": ""},
        mounts=("-t", "tmpfs", "-o", "ro", "none", str(HOME)),
    ),
    "clock moved, an hour forth and a day back": Fault(
        move_clock,
        env={
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(CLOCK),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    streams: str
    told: str
    later: str
    back: str
    broken_promises: tuple[str, ...]


def play(name: str, fault: Fault) -> Row:
    under = ("unshare", "--mount", "sh", "-c", f'mount {" ".join(fault.mounts)} && exec "$@"', "sh")
    with serving(
        model_folder("qwen2_vl"), *FLAGS, *fault.flags, env=fault.env, under=under if fault.mounts else ()
    ) as server:
        stage = Stage(server)
        seen = asyncio.run(stage.play(fault.strike, comes_back=fault.comes_back))
        left = _end(server, stage) if fault.comes_back else _ended(stage)
    return _row(name, seen, [*_judge(fault, seen), *left])


def _judge(fault: Fault, seen: Seen) -> list[str]:
    found = [f"{seen.num_hung} clients hung"] if seen.num_hung else []
    if fault.spares_streams and any(answer.error or answer.fault(1) for answer in seen.streams):
        found.append("streams were harmed")
    if failed := [answer for answer in seen.streams + seen.later if answer.status >= 500 and answer.status != 503]:
        found.append(f"{len(failed)} answers were {failed[0].status}")
    if fault.comes_back:
        found += {wrong for answer in seen.streams if (wrong := answer.fault(1))}
        found += ["nobody was served again"] if seen.back_s is None else []
    if (seen.told_s or 0) > fault.told_within_s:
        found.append(f"a stream was told after {seen.told_s:.1f} s")
    if fault.spares_later and fault.comes_back and len(seen.later) > 1:
        found.append("who came after it was refused")
    return found


def _end(server: Server, stage: Stage) -> list[str]:
    """End it as a person would, and say what it leaves behind."""
    server.interrupt()
    status = server.wait_end()
    return [*_ended(stage), *([f"exit status {status}"] if status else [])]


def _ended(stage: Stage) -> list[str]:
    deadline = time.monotonic() + GONE_S
    while (alive := [pid for pid in stage.pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [f"process {pid} is left" for pid in alive] + [f"{path} is left" for path in shared_folders(stage.pids)]


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def _row(name: str, seen: Seen, broken: Sequence[str]) -> Row:
    refused = [answer for answer in seen.later if not answer.was_accepted or answer.error]
    return Row(
        name,
        told(seen.streams),
        "" if seen.told_s is None else f"{seen.told_s:.1f} s",
        told(refused) if refused else "served",
        "" if seen.back_s is None else f"{seen.back_s:.1f} s",
        tuple(broken),
    )


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def _scramble(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])


def _misspell(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


BAD_MODELS: dict[str, Callable[[Path], None]] = {
    "weights cut in half": _cut,
    "weights with a broken header": _scramble,
    "`config.json` that is no JSON": _misspell,
    "weights that are not there": _remove,
}


def start(name: str, spoil: Callable[[Path], None]) -> tuple[str, int, str, tuple[str, ...]]:
    """Name, exit status, the last line of the log, broken promises of a start with a spoilt checkpoint."""
    folder = FOLDER / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder("qwen2_vl"), folder)
    spoil(folder)
    ended = run_to_end("--model", str(folder), "--port", "0")
    lines = ended.stderr.strip().splitlines()
    broken = ["a traceback"] if "Traceback" in ended.stderr else []
    broken += [] if ended.returncode == 1 else [f"exit status {ended.returncode}"]
    return name, ended.returncode, lines[-1].replace(str(FOLDER), "..."), tuple(broken)


def page(rows: Sequence[Row], starts: Sequence[tuple[str, int, str, tuple[str, ...]]], skipped: Sequence[str]) -> str:
    lines = ["| what broke | the 50 streams | the last was told after | a picture sent after it | served again after |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {row.name} | {row.streams} | {row.told} | {row.later} | {row.back} |" for row in rows]
    lines += ["", "| started with | exit status | last line of the log |", "|---|---|---|"]
    lines += [f"| {name} | {status} | `{line}` |" for name, status, line, _ in starts]
    broken = [f"{row.name}: {what}" for row in rows for what in row.broken_promises]
    broken += [f"{name}: {what}" for name, _, _, promises in starts for what in promises]
    lines += ["", f"Broken promises: {'; '.join(broken) or 'none'}."]
    return "\n".join(lines + [f"Not tried here: {name}." for name in skipped])


def _skipped() -> dict[str, str]:
    """Faults that this machine cannot make, and why."""
    why = (
        {} if FAKETIME.exists() else {name: "needs libfaketime" for name, f in FAULTS.items() if "LD_PRELOAD" in f.env}
    )
    if os.geteuid():
        why |= {name: "needs root, to mount a folder" for name, fault in FAULTS.items() if fault.mounts}
    return why


@click.command(context_settings=CONTEXT)
@click.option("--only", multiple=True, help="Names of faults; all when absent. Repeatable.")
@click.option("--page", "path", default="", help="Page whose section is written anew.")
def main(only: tuple[str, ...], path: str) -> None:
    for folder in (FULL, HOME):
        folder.mkdir(parents=True, exist_ok=True)
    CLOCK.write_text("+0")
    os.environ["TRUST_CLOCK"] = str(CLOCK)
    skipped = _skipped()
    rows = []
    for name, fault in FAULTS.items():
        if name not in skipped and (not only or name in only):
            rows.append(play(name, fault))
            print(json.dumps(asdict(rows[-1])), flush=True)
    starts = [start(name, spoil) for name, spoil in BAD_MODELS.items() if not only or name in only]
    text = page(rows, starts, [f"{name} ({why})" for name, why in skipped.items()])
    print(text)
    if path and not only:
        write_section(path, "faults", text)
    sys.exit(any(row.broken_promises for row in rows) or any(broken for *_, broken in starts))


if __name__ == "__main__":
    main()
