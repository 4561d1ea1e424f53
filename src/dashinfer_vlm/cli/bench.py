"""`dashinfer-vlm bench`: measurements. The measuring itself is in `dashinfer_vlm.bench`."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dashinfer_vlm import flags
from dashinfer_vlm.bench.breakdown_report import show_breakdown
from dashinfer_vlm.bench.config import ServeBench, parse_size
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.plot import check_plot, plot
from dashinfer_vlm.bench.report import as_json, table
from dashinfer_vlm.bench.serve import Measured, measure
from dashinfer_vlm.bench.target import parse_target
from dashinfer_vlm.bench.workloads import WORKLOADS
from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.cli.options import options
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.hub import resolve
from dashinfer_vlm.progress import LoadingProgress

__all__ = ["bench"]

_FILE_WIDTH = 170  # a table in a file or a pipe has room for every column
_DEFAULTS = ServeBench(targets=(), workload="single")


@click.group(context_settings=CONTEXT)
def bench() -> None:
    """Measure a server, or one step of the engine."""


@bench.command(context_settings=CONTEXT)
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME=URL",
    help="An OpenAI-compatible server. Repeatable: targets take turns, and figures are compared with the last one's.",
)
@click.option(
    "--workload",
    type=click.Choice(list(WORKLOADS)),
    default=_DEFAULTS.workload,
    show_default=True,
    help="; ".join(f"{name}: {w.summary}" for name, w in WORKLOADS.items()) + ".",
)
@click.option("--clients", default=_DEFAULTS.clients, show_default=True, help="Requests at a time; of mixed: streams.")
@click.option(
    "--requests", default=_DEFAULTS.requests, show_default=True, help="Requests of a round; each turn is one."
)
@click.option("--rounds", default=_DEFAULTS.rounds, show_default=True, help="How often each target has its turn.")
@click.option(
    "--warmup",
    type=int,
    help="Conversations before a target's first round that are not counted; one per client when absent. Later rounds "
    "begin with one.",
)
@click.option("--output-tokens", type=int, help="Tokens of every answer; 64 when absent, of docs 120.")
@click.option("--prompt-words", default=_DEFAULTS.prompt_words, show_default=True, help="Words of every question.")
@click.option(
    "--image-size", metavar="PX|WxH", help="Size of the pictures; 448, of mixed 896, of docs three sizes when absent."
)
@click.option(
    "--seconds",
    default=_DEFAULTS.seconds,
    show_default=True,
    help="Of mixed: length of its two windows, the first without pictures.",
)
@click.option("--every", default=_DEFAULTS.every, show_default=True, help="Of mixed: seconds between two pictures.")
@click.option(
    "--seed",
    type=int,
    help="What words and pictures are made from; drawn when absent, so that no server knows them from an earlier run.",
)
@click.option(
    "--timeout-s", default=_DEFAULTS.timeout_s, show_default=True, help="Silence after which a request has failed."
)
@click.option("--api-key", help="Sent to every target.", envvar="DASHINFER_API_KEY")
@click.option(
    "--pid",
    "pids",
    multiple=True,
    metavar="NAME=PID",
    help="Process of a target; its memory is measured, its descendants' included.",
)
@click.option(
    "--breakdown",
    is_flag=True,
    help="Also tell where the time of a server of ours goes, by its own counters, and how near it is to what the "
    "machine could do.",
)
@click.option("--pause-idle", is_flag=True, help="Stop the processes of all other targets while one is measured.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also draw the waits into this PNG, SVG or PDF file.",
)
def serve(
    urls: tuple[str, ...],
    targets: tuple[str, ...],
    pids: tuple[str, ...],
    image_size: str | None,
    seed: int | None,
    plot_file: Path | None,
    **values: Any,
) -> int:
    """Measure OpenAI-compatible servers with equal requests, answers of forced length and new pictures.

    Ends with a table and, as the last line, one JSON object. The exit code is 1 when a request failed.
    """
    config = ServeBench(
        targets=tuple(parse_target(text) for text in (*targets, *urls)),
        pids=dict(_parse_pid(text) for text in pids),
        image_size=parse_size(image_size) if image_size else None,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        **values,
    )
    config.validate()
    if plot_file:
        check_plot(plot_file)
    measured = asyncio.run(_watched(config))
    console = _console()
    console.print(table(config, measured))
    for one in measured:
        for reason, count in one.figures().failures.reasons.items():
            console.print(f"{one.target.name}: {count} failed: {reason}", markup=False)
    for one in measured:
        show_breakdown(console, one)
    if plot_file:
        plot(config, measured, plot_file)
    click.echo(json.dumps(as_json(config, Machine.here(), measured)))
    return int(any(one.figures().failures.num for one in measured))


@bench.command(context_settings=CONTEXT)
@click.option("--breakdown", is_flag=True, help="Also tell which part of the work takes how long, and how fast it is.")
@click.option("--batch", default=1, show_default=True, metavar="COUNT", help="Sequences that decode at once.")
@click.option("--prompt-tokens", default=512, show_default=True, metavar="COUNT", help="Tokens of every prompt.")
@click.option("--output-tokens", default=32, show_default=True, metavar="COUNT", help="Decode steps.")
@click.option("--image", is_flag=True, help="Also encode pictures.")
@click.option("--image-size", metavar="PX|WxH", default="448", show_default=True, help="Their size, multiples of 28.")
@click.option(
    "--repeats", default=3, show_default=True, metavar="COUNT", help="Prompts, and pictures, after a first one."
)
@options(EngineConfig)
def latency(
    breakdown: bool, batch: int, prompt_tokens: int, output_tokens: int, image: bool, image_size: str, repeats: int,
    **values: Any,
) -> None:  # fmt: skip
    """Measure an engine in this process, without HTTP: a prompt, decode steps, a picture.

    Ends with tables and, as the last line, one JSON object.
    """
    # torch takes seconds to import, which `bench serve` should not wait for
    from dashinfer_vlm.bench.latency import LatencyBench, Limits, measure_latency
    from dashinfer_vlm.bench.latency_report import latency_json, latency_table, latency_title

    engine = flags.build(EngineConfig, values)
    engine.validate()
    config = LatencyBench(
        engine=resolve(engine),
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        image_size=parse_size(image_size) if image else None,
        repeats=repeats,
        breakdown=breakdown,
    )
    with LoadingProgress() as progress:
        phases = measure_latency(config, progress)
    limits = Limits.measured()
    console = _console()
    for phase in phases:
        console.print(latency_title(phase))
        if phase.parts:
            console.print(latency_table(phase))
    console.print(f"for scale, through torch: reads {limits.read_gb_s:.1f} GB/s, {limits.multiply_gflop_s:.0f} GFLOP/s")
    click.echo(json.dumps(latency_json(config, Machine.here(), limits, phases)))


async def _watched(config: ServeBench) -> list[Measured]:
    """Measure with a bar per target on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = None if config.workload == "mixed" else config.rounds * config.requests
    # two redraws a second: the processor belongs to the servers
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as bar:
        tasks = {target.name: bar.add_task(target.name, total=total) for target in config.targets}
        return await measure(config, lambda name: bar.advance(tasks[name]))


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def _parse_pid(text: str) -> tuple[str, int]:
    name, _, pid = text.partition("=")
    if not name or not pid.isdigit():
        raise ConfigError(f"--pid is {text!r}; it must be NAME=PID")
    return name, int(pid)
