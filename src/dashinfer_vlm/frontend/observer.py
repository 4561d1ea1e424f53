"""What the front end tells about its requests while they run, and when they are over; the server's metrics, its log and
its traces listen."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from dashinfer_vlm.request import SamplingParams
from dashinfer_vlm.stages import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerReport:
    """One answer of a call, times on the clock of `stages.py`."""

    reason: str
    """stop, length, tool_calls, abort, timeout or error; abort also as long as it runs."""
    num_tokens: int
    first_token_s: float | None
    last_token_s: float | None
    spans: tuple[Span, ...]
    """What it has waited for in the engine, and the making of its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReport:
    """What came of one call: of all of it once it is over, else of what is there already."""

    num_prompt_tokens: int
    """Of all its prompts."""
    num_cached_tokens: int
    num_output_tokens: int
    sampling: SamplingParams
    """Of its first answer."""
    answers_per_prompt: int
    start_s: float
    end_s: float
    spans: tuple[Span, ...]
    """Of its media."""
    answers: tuple[AnswerReport, ...]

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the call to the first token of all its answers."""
        first = min((a.first_token_s for a in self.answers if a.first_token_s is not None), default=None)
        return None if first is None else first - self.start_s


Report = Callable[[], CallReport]

current_calls: ContextVar[list[Report] | None] = ContextVar("current_calls", default=None)
"""Where whoever serves a request collects the calls that are made for it."""


class Observer(Protocol):
    """Called in the event loop, so every method must be quick and must not raise."""

    def tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None:
        """`num_tokens` of one choice came at once, `seconds` after the ones before, or after the request if `first`."""
        ...

    def ended(self, report: CallReport) -> None:
        """A call is over."""
        ...


class Silence:
    """Nobody listens."""

    def tokens(self, num_tokens: int, seconds: float, *, first: bool) -> None: ...

    def ended(self, report: CallReport) -> None: ...
