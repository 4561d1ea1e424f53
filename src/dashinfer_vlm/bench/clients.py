"""Many clients in one event loop. A client sends its next request as soon as the last one has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dashinfer_vlm.bench.events import Failure, Outcome
from dashinfer_vlm.bench.target import Send
from dashinfer_vlm.bench.workloads import Conversation, Turn

__all__ = ["Batch", "Window", "Windows", "run_batch", "run_window"]

_FIRST_PICTURE = 0.25
"""The first picture comes after this part of the time between two: the streams are flowing by then."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A fixed number of requests, and how long they took together."""

    outcomes: tuple[Outcome, ...]
    wall_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time with streams in it; requests that it cut off at its end were still answered whole."""

    start_s: float
    seconds: float
    texts: tuple[Outcome, ...]
    pictures: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Windows:
    """The same streams without pictures and with them."""

    plain: Window
    pictures: Window


async def run_batch(
    send: Send, work: Sequence[Conversation], num_tokens: int, num_clients: int, on_end: Callable[[], None]
) -> Batch:
    """All conversations of `work`, `num_clients` at a time; the turns of one come after each other.

    `on_end` is called after every request.
    """
    waiting = iter(work)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for conversation in waiting:
            for place, turn in enumerate(conversation):
                outcomes.append(await send(turn, num_tokens, place))
                on_end()

    start_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(min(num_clients, len(work)))))
    return Batch(tuple(outcomes), time.perf_counter() - start_s)


async def run_window(
    send: Send,
    streams: Sequence[Iterator[Turn]],
    pictures: Sequence[Turn],
    num_tokens: int,
    seconds: float,
    on_end: Callable[[], None],
) -> Window:
    """One client per iterator of `streams` for `seconds`, while `pictures` arrive at equal distances.

    A stream whose request fails ends there: a dead server would fail thousands of times. `on_end` is called after every
    request.
    """
    texts: list[Outcome] = []
    start_s = time.perf_counter()
    end_s = start_s + seconds

    async def stream(turns: Iterator[Turn]) -> None:
        for turn in turns:
            outcome = await send(turn, num_tokens, 0)
            texts.append(outcome)
            on_end()
            if isinstance(outcome, Failure) or time.perf_counter() >= end_s:
                return

    async def picture(turn: Turn, place: int) -> Outcome:
        await asyncio.sleep((place + _FIRST_PICTURE) * seconds / len(pictures))
        return await send(turn, num_tokens, 0)

    asked = asyncio.gather(*(picture(turn, i) for i, turn in enumerate(pictures)))
    await asyncio.gather(*(stream(turns) for turns in streams))
    return Window(start_s, seconds, tuple(texts), tuple(await asked))
