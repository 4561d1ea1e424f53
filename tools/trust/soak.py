"""Half an hour of every kind of request at once: nothing may be lost, and nothing may grow.

    python tools/trust/soak.py --minutes 30

A tiny random model behind the real command, with small caches, so that they are full before the first figure is taken.
Ends with a table, one JSON object, and status 1 where a promise is broken.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

import rich_click as click

from dashinfer_vlm.bench.processes import ProcessTree
from dashinfer_vlm.cli.command import CONTEXT
from trust.answers import Answer, Asked, ask, connect
from trust.mix import KINDS
from trust.page import write_section
from trust.server import TIMEOUT_S, Metrics, model_folder, serving
from trust.vitals import Vitals, shared_folders, take_vitals

FLAGS = "--kv-cache-gib 0.05 --media-cache-mib 8 --vision-cache-gib 0.008 --responses-store-mib 4".split()
"""What is kept is bounded by these; their defaults would take longer than half an hour to fill."""
FLAGS += "--max-model-len 4096 --threads 1".split()
EVERY_S = 5.0
MOST_GROWTH = 0.03
"""Of resident memory, last third over first third."""
CHOICES = "dashinfer_choices_total"


@dataclass
class Tally:
    """What the clients saw."""

    sent: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    choices: int = 0
    """Answers of the accepted requests."""
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, asked: Asked, answer: Answer) -> None:
        self.sent[kind] += 1
        if answer.was_accepted:
            self.accepted[kind] += 1
            self.left[kind] += answer.has_left
            self.choices += asked.num_choices
            self.ended.update(answer.finals)
        else:
            self.refused[f"{answer.status} {answer.error}"] += 1
        if fault := self._fault(kind, asked, answer):
            self.faults.append(f"{kind}: {fault}")

    def _fault(self, kind: str, asked: Asked, answer: Answer) -> str:
        if answer.status == 0 or answer.status >= 500:
            return f"{answer.status} {answer.error}"
        if kind == "wrong input":
            return "accepted" if answer.was_accepted else ""
        if not answer.was_accepted:
            return f"refused with {answer.status} {answer.error}"
        if any(final.startswith("error") for final in answer.finals):
            return str(answer.finals)
        return answer.fault(asked.num_choices)


@dataclass(frozen=True, slots=True)
class Soaked:
    """What half an hour showed."""

    minutes: float
    tally: Tally
    vitals: list[Vitals]
    metrics: Metrics
    """Once everything was over."""
    seen: Metrics
    """Before the first request."""
    left_behind: list[str]

    def means(self, name: str) -> tuple[float, float]:
        """Of the first third and of the last one."""
        third = len(self.vitals) // 3
        values = [float(getattr(vital, name)) for vital in self.vitals]
        return fmean(values[:third]), fmean(values[-third:])

    def memory_of_each_mib(self) -> dict[str, tuple[float, float]]:
        """As `means`, by what processes are."""
        third = len(self.vitals) // 3
        thirds = self.vitals[:third], self.vitals[-third:]
        names = {name for vital in self.vitals for name in vital.memory_of_each}
        first, last = ({n: fmean(v.memory_of_each.get(n, 0) for v in part) / 2**20 for n in names} for part in thirds)
        return {name: (round(first[name], 1), round(last[name], 1)) for name in sorted(names)}

    @property
    def num_ended(self) -> float:
        """Answers that the server says are over."""
        return self.metrics.sum(CHOICES) - self.seen.sum(CHOICES)

    def broken_promises(self) -> list[str]:
        found = [*self.tally.faults[:20]]
        if self.num_ended != self.tally.choices:
            found.append(f"{self.tally.choices} answers were begun, {self.num_ended:g} have ended")
        first, last = self.means("memory")
        if last > first * (1 + MOST_GROWTH):
            found.append(f"memory grew from {first / 2**20:.0f} to {last / 2**20:.0f} MiB")
        for name, slack in (("descriptors", 3.0), ("threads", 1.0), ("processes", 0.5), ("shared", 2**20)):
            first, last = self.means(name)
            if last > first * (1 + MOST_GROWTH) + slack:
                found.append(f"{name} grew from {first:.1f} to {last:.1f}")
        engine = "dashinfer_engine_num_"
        if self.metrics[engine + "free_blocks"] != self.metrics[engine + "blocks"]:
            found.append(f"{self.metrics[engine + 'blocks'] - self.metrics[engine + 'free_blocks']:g} blocks are held")
        for name in (engine + "waiting", engine + "running", "dashinfer_requests_in_flight"):
            if self.metrics[name]:
                found.append(f"{name} is {self.metrics[name]:g} at the end")
        return found + [f"left behind: {name}" for name in self.left_behind]


async def clients(url: str, num_clients: int, seed: int, seconds: float, tally: Tally) -> None:
    """Each sends its next request as soon as the last one has ended."""
    kinds = list(KINDS)
    end_s = time.perf_counter() + seconds

    async def client(number: int) -> None:
        random = Random(seed * 1000 + number)
        async with connect(url, TIMEOUT_S) as http:
            while time.perf_counter() < end_s:
                kind = random.choices(kinds, [share for _, share in KINDS.values()])[0]
                asked = await asyncio.to_thread(KINDS[kind][0], random)
                tally.add(kind, asked, await ask(http, asked))

    await asyncio.gather(*(client(number) for number in range(num_clients)))


async def watch(tree: ProcessTree, vitals: list[Vitals]) -> None:
    while True:
        vitals.append(await asyncio.to_thread(take_vitals, tree))
        await asyncio.sleep(EVERY_S)


async def soak(url: str, tree: ProcessTree, minutes: float, warm_minutes: float, num_clients: int) -> Soaked:
    tally, vitals = Tally(), []
    before = Metrics.of(url)
    await clients(url, num_clients, 1, warm_minutes * 60, tally)
    watching = asyncio.create_task(watch(tree, vitals))
    await clients(url, num_clients, 2, minutes * 60, tally)
    watching.cancel()
    await wait_idle(url)
    return Soaked(minutes, tally, vitals, Metrics.of(url), before, [])


async def wait_idle(url: str) -> None:
    """Until what clients left is over; a bound, since the figures will tell when it never is."""
    for _ in range(100):
        if not Metrics.of(url)["dashinfer_requests_in_flight"]:
            return
        await asyncio.sleep(0.1)


def report(soaked: Soaked) -> dict[str, Any]:
    tally = soaked.tally
    return {
        "minutes": soaked.minutes,
        "requests": tally.sent.total(),
        "accepted": tally.accepted.total(),
        "left": tally.left.total(),
        "refused": dict(tally.refused.most_common()),
        "ended": dict(tally.ended.most_common()),
        "answers": [tally.choices, soaked.num_ended],
        "kinds": {kind: tally.sent[kind] for kind in KINDS},
        "memory_mib": [round(value / 2**20, 1) for value in soaked.means("memory")],
        "memory_of_each_mib": soaked.memory_of_each_mib(),
        **{name: [round(v, 1) for v in soaked.means(name)] for name in ("descriptors", "threads", "processes")},
        "shared_mib": [round(value / 2**20, 2) for value in soaked.means("shared")],
        "blocks": [soaked.metrics["dashinfer_engine_num_free_blocks"], soaked.metrics["dashinfer_engine_num_blocks"]],
        "left_behind": soaked.left_behind,
        "broken_promises": soaked.broken_promises(),
    }


def page(told: dict[str, Any]) -> str:
    first, last = told["memory_mib"]
    rows = [
        ("requests", f"{told['requests']:,}"),
        ("accepted, each of which ended in one final event", f"{told['accepted']:,}"),
        ("answers of these, begun and ended", "{:,.0f} and {:,.0f}".format(*told["answers"])),
        ("those of them whose client left on its own account", f"{told['left']:,}"),
        ("refused, by status", ", ".join(f"{name} {count:,}" for name, count in told["refused"].items())),
        ("memory, first third and last third", f"{first:.0f} and {last:.0f} MiB ({last / first - 1:+.1%})"),
        *((f"... of `{n}`", "{:.0f} and {:.0f} MiB".format(*v)) for n, v in told["memory_of_each_mib"].items()),
        *((name, "{:.1f} and {:.1f}".format(*told[name])) for name in ("descriptors", "threads", "processes")),
        ("shared memory", "{:.2f} and {:.2f} MiB".format(*told["shared_mib"])),
        ("KV blocks free at the end", "{:.0f} of {:.0f}".format(*told["blocks"])),
        ("broken promises", "; ".join(told["broken_promises"]) or "none"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


@click.command(context_settings=CONTEXT)
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--warm-minutes", default=2.0, show_default=True, help="Caches fill before the first third begins.")
@click.option("--clients", "num_clients", default=16, show_default=True)
@click.option("--page", "path", default="", help="Page whose section is written anew.")
def main(minutes: float, warm_minutes: float, num_clients: int, path: str) -> None:
    with serving(model_folder("qwen2_vl"), *FLAGS) as server:
        tree = ProcessTree(server.process.pid)
        pids = tree.members()
        soaked = asyncio.run(soak(server.address, tree, minutes, warm_minutes, num_clients))
        server.interrupt()
        status = server.wait_end()
    soaked.left_behind.extend(str(folder) for folder in shared_folders(pids))
    if status:
        soaked.left_behind.append(f"exit status {status}")
    told = report(soaked)
    if path:
        write_section(path, "soak", page(told))
    print(page(told))
    print(json.dumps(told))
    sys.exit(bool(told["broken_promises"]))


if __name__ == "__main__":
    main()
