"""A server with fifty running streams, and what they and those who come meanwhile see when something breaks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
from tests.e2e.serving import Server

from dashinfer_vlm.bench.processes import ProcessTree
from trust.answers import Answer, Asked, ask, connect
from trust.mix import CHAT, chat, picture

__all__ = ["ENGINE", "MEDIA", "VISION", "Seen", "Stage", "told"]

NUM_STREAMS = 50
NUM_PICTURES = 10
"""Those of the streams that begin with a picture of their own."""
NUM_TOKENS = 800
HUNG_S = 60.0
"""Without a piece of its stream, or without a status, a client hangs."""
BACK_S = 60.0
_LOOK_S = 0.1
ENGINE, MEDIA = "dashinfer_vlm.engine.host.child", "dashinfer_vlm.media.decode"
VISION = "dashinfer_vlm.encoders.elsewhere.worker"

Strike = Callable[["Stage"], None]


@dataclass(slots=True)
class Seen:
    """By clients of one server in one fault."""

    streams: list[Answer]
    later: list[Answer] = field(default_factory=list)
    """Chats that came after the fault, one after the other, until one was answered."""
    struck_s: float = 0.0
    back_s: float | None = None
    """From the fault to the end of the first answer to a chat that came after it; None: there was none."""

    @property
    def num_hung(self) -> int:
        return sum(answer.error == "hung" for answer in self.streams + self.later)

    @property
    def told_s(self) -> float | None:
        """From the fault to when the last stream that it ended was told; None where it ended none."""
        ended = [a for a in self.streams if (a.was_accepted and a.error) or "error" in " ".join(a.finals)]
        return max((answer.end_s - self.struck_s for answer in ended), default=None)


class Stage:
    """The server of one fault."""

    def __init__(self, server: Server) -> None:
        self.url = server.address
        self.tree = ProcessTree(server.process.pid)
        self.pids = self.tree.members()

    def find(self, module: str) -> int:
        """The process that runs `module`."""
        for pid in self.tree.members():
            if module in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        raise LookupError(f"no process of the server runs {module}")

    async def play(self, strike: Strike, *, comes_back: bool) -> Seen:
        """Start the streams, strike when all of them flow, and see them to their ends."""
        async with connect(self.url, None) as http:
            random = Random(1)
            asked = [_stream(random, number) for number in range(NUM_STREAMS)]
            answers = [Answer() for _ in asked]
            streams = [asyncio.create_task(ask(http, one, answer)) for one, answer in zip(asked, answers, strict=True)]
            await _until_all_flow(answers, streams)
            seen = Seen(answers, struck_s=time.perf_counter())
            await asyncio.to_thread(strike, self)
            await asyncio.gather(self._come_later(http, seen, comes_back), _end(streams, answers))
            return seen

    async def _come_later(self, http: httpx.AsyncClient, seen: Seen, comes_back: bool) -> None:
        """With a picture that is new, so that every process is needed."""
        random = Random(2)
        while seen.back_s is None and time.perf_counter() - seen.struck_s < BACK_S:
            answer = Answer()
            body = chat(random, picture(1000 + len(seen.later)), max_tokens=4)
            await _end([asyncio.create_task(ask(http, Asked(CHAT, body), answer))], [answer])
            seen.later.append(answer)
            if answer.was_accepted and not answer.error:
                seen.back_s = answer.end_s - seen.struck_s
            elif not comes_back and answer.status == 0:
                return
            await asyncio.sleep(_LOOK_S)


def _stream(random: Random, number: int) -> Asked:
    parts = [picture(2000 + number)] if number < NUM_PICTURES else []
    return Asked(CHAT, chat(random, *parts, stream=True, max_tokens=NUM_TOKENS, ignore_eos=True))


async def _until_all_flow(answers: Sequence[Answer], streams: Sequence[asyncio.Task[Answer]]) -> None:
    while not all(len(answer.pieces_s) > 1 or task.done() for answer, task in zip(answers, streams, strict=True)):
        await asyncio.wait(streams, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
    if early := [answer for answer in answers if answer.num_ends]:
        raise RuntimeError(f"{len(early)} streams were over before the fault, such as {early[0]}")


async def _end(tasks: Sequence[asyncio.Task[Answer]], answers: Sequence[Answer]) -> None:
    """See them to their ends, but for those of which nothing is heard any more."""
    for task, answer in zip(tasks, answers, strict=True):
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_S)
            if time.perf_counter() - max([answer.sent_s, *answer.pieces_s[-1:]]) > HUNG_S:
                task.cancel()
                answer.error, answer.end_s = "hung", time.perf_counter()
                break


def told(answers: Sequence[Answer]) -> str:
    """What clients saw, such as `48 whole, 2 error event engine_dead`."""
    counts = Counter(_say(answer) for answer in answers)
    return ", ".join(f"{count} {words}" for words, count in counts.most_common())


def _say(answer: Answer) -> str:
    if answer.error in ("hung", "ConnectError"):
        return {"hung": "hung", "ConnectError": "connection refused"}[answer.error]
    if answer.status and not answer.was_accepted:
        return f"{answer.status} `{answer.error}`" + (" with `Retry-After`" if answer.retry_after else "")
    if answer.error:
        return "connection broken"
    errors = [final for final in answer.finals if final.startswith("error")]
    return f"event `{errors[0]}`" if errors else "whole"
