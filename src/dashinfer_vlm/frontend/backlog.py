"""What has been asked and has no token yet: how much of it there may be, and how long it will take.

How fast it goes is learnt from how fast it went, so that no speed of any machine stands here: units that have left the
backlog, by the seconds in which there were any.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.frontend.prompt import Prompt

_MEMORY_S = 60.0
"""Busy seconds after which an observation counts half."""
_MOST_WAIT_S = 600
"""Told to clients at most: by then much may have changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait for its first token, all requests together; infinity is no limit."""

    requests: float = math.inf
    """Beside those for which the engine has places."""
    tokens: float = math.inf
    """Of prompts, those that stand for pictures and videos among them."""
    visual_tokens: float = math.inf
    encoder_s: float = math.inf
    """Seconds that the vision encoder is expected to need for what waits."""

    @classmethod
    def of(cls, config: ServerConfig) -> QueueLimits:
        return cls(
            requests=config.max_queued_requests,
            tokens=config.max_queued_tokens,
            visual_tokens=config.max_queued_visual_tokens,
            encoder_s=config.max_queued_encoder_s,
        )


NO_LIMITS = QueueLimits()


class Flow:
    """Units of one kind that wait, and the rate at which they stop waiting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiting = 0
        self._clock = clock
        self._gone = self._busy_s = 0.0
        self._seen_s = clock()

    def add(self, units: int) -> None:
        self._observe()
        self.waiting += units

    def leave(self, units: int, *, served: bool) -> None:
        """They wait no more: `served`, or because nobody wants them."""
        self._observe()
        self.waiting -= units
        self._gone += units if served else 0

    def seconds(self, units: float) -> float:
        """How long so many will take; 0 as long as nothing is known."""
        self._observe()
        return units * self._busy_s / self._gone if self._gone else 0.0

    def _observe(self) -> None:
        now_s = self._clock()
        passed_s, self._seen_s = now_s - self._seen_s, now_s
        if self.waiting:
            kept = 0.5 ** (passed_s / _MEMORY_S)
            self._gone, self._busy_s = kept * self._gone, kept * self._busy_s + passed_s


@dataclass(frozen=True, slots=True)
class Load:
    """What one call asks of the engine before its first token."""

    tokens: int = 0
    visual_tokens: int = 0
    patches: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Load:
        items = [item for prompt in prompts for item in prompt.items]
        works = {item.content_hash: item.work for item in items}
        return cls(sum(len(p.ids) for p in prompts), sum(item.num_tokens for item in items), sum(works.values()))


ANY_LOAD = Load(tokens=1)
"""What every call asks at least."""


class Backlog:
    """Belongs to one event loop."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self.requests, self.tokens, self.visual_tokens, self.patches = (Flow(clock) for _ in range(4))

    @property
    def encoder_s(self) -> float:
        """Seconds that the vision encoder is expected to need for what waits."""
        return self.patches.seconds(self.patches.waiting)

    def check(self, load: Load) -> None:
        """Raise OverloadedError when what waits leaves no room for this. Where nothing waits there is room."""
        limits = self._limits
        self._check(self.tokens, load.tokens, limits.tokens, "tokens of prompts", "queued_tokens")
        self._check(
            self.visual_tokens, load.visual_tokens, limits.visual_tokens, "visual tokens", "queued_visual_tokens"
        )
        encoder_s = self.patches.seconds(self.patches.waiting + load.patches)
        if load.patches and self.patches.waiting and encoder_s > limits.encoder_s:
            raise _full(
                f"the vision encoder would be busy for {encoder_s:.0f} s with what waits and with this, over the limit "
                f"of {limits.encoder_s:g}",
                "queued_encoder_s",
                encoder_s - limits.encoder_s,
            )

    def enter(self, load: Load) -> None:
        for flow, units in self._flows(load):
            flow.add(units)

    def leave(self, load: Load, *, served: bool) -> None:
        """`served`: with its first token."""
        for flow, units in self._flows(load):
            flow.leave(units, served=served)

    def seconds_for_a_place(self) -> int:
        """When a client should ask again that finds all places for requests taken."""
        return _told(self.requests.seconds(1))

    def _flows(self, load: Load) -> tuple[tuple[Flow, int], ...]:
        return (
            (self.requests, 1),
            (self.tokens, load.tokens),
            (self.visual_tokens, load.visual_tokens),
            (self.patches, load.patches),
        )

    def _check(self, flow: Flow, units: int, most: float, what: str, reason: str) -> None:
        if units and flow.waiting and flow.waiting + units > most:
            message = (
                f"{flow.waiting} {what} wait, and with these {units} more they would be over the limit of {most:g}"
            )
            raise _full(message, reason, flow.seconds(flow.waiting + units - most))


def _full(message: str, reason: str, wait_s: float) -> OverloadedError:
    told_s = _told(wait_s)
    return OverloadedError(f"{message}; try again in {told_s} s", reason=reason, retry_after_s=told_s)


def _told(wait_s: float) -> int:
    return min(_MOST_WAIT_S, max(1, math.ceil(wait_s)))
