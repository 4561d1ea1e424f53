"""Measures servers through HTTP: round after round, one target at a time under load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeAlias

import httpx

from dashinfer_vlm.bench.breakdown import Breakdown, break_down
from dashinfer_vlm.bench.clients import Batch, Windows, run_batch, run_window
from dashinfer_vlm.bench.config import ServeBench
from dashinfer_vlm.bench.events import Failure
from dashinfer_vlm.bench.figures import BatchFigures, WindowFigures, batch_figures, window_figures
from dashinfer_vlm.bench.floor import measure_rates, read_work
from dashinfer_vlm.bench.processes import MemoryWatch, ProcessTree
from dashinfer_vlm.bench.readings import Readings, read_metrics
from dashinfer_vlm.bench.target import BenchError, Send, Target, connect, find_model, sender
from dashinfer_vlm.bench.workloads import Conversation, Work, conversations, texts

__all__ = ["Measured", "Progress", "measure"]

Progress: TypeAlias = Callable[[str], None]
"""Is called with the target's name after every request."""
_Run: TypeAlias = Callable[[Send, Callable[[], None]], Awaitable[Batch | Windows]]


@dataclass(frozen=True, slots=True)
class _Round:
    """The same for every target."""

    warmup: list[Conversation]
    run: _Run


@dataclass(slots=True)
class Measured:
    """What came back from one target, round by round."""

    target: Target
    rounds: list[Batch | Windows] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    """None: its process is not known."""
    readings: Readings | None = None
    breakdown: Breakdown | None = None
    no_breakdown: str = ""
    """Why there is none, where one was asked for."""

    def figures(self) -> BatchFigures | WindowFigures:
        windows = [r for r in self.rounds if isinstance(r, Windows)]
        if windows:
            return window_figures(windows, self.peak_memory_bytes)
        return batch_figures([r for r in self.rounds if isinstance(r, Batch)], self.peak_memory_bytes)


async def measure(config: ServeBench, progress: Progress = lambda name: None) -> list[Measured]:
    """Every target of `config`, in its order.

    Raises ConfigError for values that cannot be measured with, and BenchError when a target cannot be reached or fails
    its warm-up. A request that fails later is part of what was measured.
    """
    config.validate()
    work = config.work()
    trees = {name: ProcessTree(pid) for name, pid in config.pids.items()}
    async with connect(config.timeout_s, config.api_key) as http:
        results = [Measured(await find_model(http, target)) for target in config.targets]
        for result in results if config.breakdown else ():
            await _ask_for_breakdown(http, result)
        for number in range(config.rounds):
            plan = _mixed_round(config, work, number) if work.name == "mixed" else _batch_round(config, work, number)
            for result in results:
                name = result.target.name
                idle = [tree for other, tree in trees.items() if other != name] if config.pause_idle else []
                with _paused(idle):
                    await _visit(result, plan, http, config, trees.get(name), progress)
    with _paused(list(trees.values()) if config.pause_idle else []):
        _break_down([result for result in results if result.readings], config.clients)
    return results


def _batch_round(config: ServeBench, work: Work, number: int) -> _Round:
    asked = conversations(work, config.num_conversations, 2 * number + 1)

    async def run(send: Send, on_end: Callable[[], None]) -> Batch:
        return await run_batch(send, asked, work.output_tokens, config.clients, on_end)

    return _Round(conversations(work, _num_warmup(config, number), 2 * number), run)


def _mixed_round(config: ServeBench, work: Work, number: int) -> _Round:
    warmup = conversations(work, min(1, config.num_warmup), 2 * number)
    words = islice(texts(work, 2 * number, config.clients), _num_warmup(config, number))
    pictures = [turn for (turn,) in conversations(work, round(config.seconds / config.every), 2 * number + 1)]

    async def run(send: Send, on_end: Callable[[], None]) -> Windows:
        streams = [[texts(work, 2 * number + i, client) for client in range(config.clients)] for i in (0, 1)]
        window = partial(run_window, num_tokens=work.output_tokens, seconds=config.seconds, on_end=on_end)
        return Windows(await window(send, streams[0], []), await window(send, streams[1], pictures))

    return _Round([*warmup, *((turn,) for turn in words)], run)


def _num_warmup(config: ServeBench, number: int) -> int:
    """Later rounds only have to wake the server up."""
    return config.num_warmup if number == 0 else min(1, config.num_warmup)


async def _visit(
    result: Measured,
    plan: _Round,
    http: httpx.AsyncClient,
    config: ServeBench,
    tree: ProcessTree | None,
    progress: Progress,
) -> None:
    name, send = result.target.name, sender(http, result.target)
    await _warm_up(send, plan.warmup, config, name)
    async with AsyncExitStack() as stack:
        watch = await stack.enter_async_context(MemoryWatch(tree)) if tree else None
        before = await read_metrics(http, result.target) if result.readings else None
        result.rounds.append(await plan.run(send, partial(progress, name)))
        if result.readings and before:
            result.readings.add(before, await read_metrics(http, result.target))
    if watch:
        result.peak_memory_bytes = max(result.peak_memory_bytes or 0, watch.peak_bytes)


async def _ask_for_breakdown(http: httpx.AsyncClient, result: Measured) -> None:
    try:
        result.readings = Readings((await read_metrics(http, result.target)).facts)
    except BenchError as error:
        result.no_breakdown = str(error)


def _break_down(results: list[Measured], num_clients: int) -> None:
    """While nobody computes, since the floor's rates are measured."""
    works = [read_work(result.readings.facts) if result.readings else None for result in results]
    numbers = {of for work in works if work for of in (work.text_numbers, work.vision_numbers)}
    rates = measure_rates(numbers) if numbers else None
    for result, work in zip(results, works, strict=True):
        assert result.readings
        result.breakdown = break_down(result.readings, num_clients, work, rates)


async def _warm_up(send: Send, warmup: list[Conversation], config: ServeBench, name: str) -> None:
    """Requests that nobody counts; raises BenchError when one fails, before minutes are spent."""
    batch = await run_batch(send, warmup, config.work().output_tokens, config.clients, lambda: None)
    for outcome in batch.outcomes:
        if isinstance(outcome, Failure):
            raise BenchError(f"{name} fails to warm up: {outcome.reason}")


@contextmanager
def _paused(trees: list[ProcessTree]) -> Iterator[None]:
    with ExitStack() as stack:
        for tree in trees:
            stack.enter_context(tree.paused())
        yield
