"""What the outcomes amount to. Failures are counted apart and enter no other figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dashinfer_vlm.bench.clients import Batch, Window, Windows
from dashinfer_vlm.bench.events import Failure, Outcome, Reply

__all__ = ["BatchFigures", "Failures", "Percentiles", "Spread", "WindowFigures", "batch_figures", "window_figures"]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `num` values in seconds, interpolated linearly between neighbours."""

    num: int
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles | None:
        """None when there is no value."""
        found = np.fromiter(values, dtype=np.float64)
        if not found.size:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(found, (50, 90, 99)))
        return cls(found.size, p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure per round."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Failures:
    num: int
    reasons: dict[str, int]
    """How many requests failed for which reason."""

    @classmethod
    def among(cls, outcomes: Iterable[Outcome]) -> Failures:
        reasons = Counter(outcome.reason for outcome in outcomes if isinstance(outcome, Failure))
        return cls(reasons.total(), dict(reasons))


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """Of one target: latencies over the requests of all rounds, rates over the rounds."""

    num_replies: int
    failures: Failures
    requests_per_s: Spread
    output_tokens_per_s: Spread
    first_token_s: Percentiles | None
    first_token_s_by_turn: tuple[Percentiles | None, ...]
    per_token_s: Percentiles | None
    gap_s: Percentiles | None
    request_s: Percentiles | None
    num_prompt_tokens: int
    """Median of a request."""
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """Of one target: its streams without pictures and with them, over all rounds."""

    failures: Failures
    tokens_plain: Spread
    """Text tokens delivered in a window."""
    tokens_pictures: Spread
    tokens_kept: float
    """With pictures over without."""
    gap_plain_s: Percentiles | None
    gap_pictures_s: Percentiles | None
    gap_ratio: float | None
    """The 99th percentile with pictures over the one without."""
    first_token_plain_s: Percentiles | None
    first_token_pictures_s: Percentiles | None
    picture_first_token_s: Percentiles | None
    """Of the requests that bring the pictures."""
    num_pictures: int
    peak_memory_bytes: int | None


def batch_figures(rounds: Sequence[Batch], peak_memory_bytes: int | None = None) -> BatchFigures:
    """Figures of one target; `rounds` has at least one."""
    outcomes = [outcome for batch in rounds for outcome in batch.outcomes]
    replies = _replies(outcomes)
    turns = range(1 + max((outcome.turn for outcome in outcomes), default=0))
    return BatchFigures(
        num_replies=len(replies),
        failures=Failures.among(outcomes),
        requests_per_s=Spread.of([len(_replies(batch.outcomes)) / batch.wall_s for batch in rounds]),
        output_tokens_per_s=Spread.of(
            [sum(r.num_output_tokens for r in _replies(batch.outcomes)) / batch.wall_s for batch in rounds]
        ),
        first_token_s=Percentiles.of(r.first_token_s for r in replies),
        first_token_s_by_turn=tuple(
            Percentiles.of(r.first_token_s for r in replies if r.turn == turn) for turn in turns
        ),
        per_token_s=Percentiles.of(r.per_token_s for r in replies),
        gap_s=Percentiles.of(gap for r in replies for gap in r.gaps_s),
        request_s=Percentiles.of(r.ended_s - r.sent_s for r in replies),
        num_prompt_tokens=int(median(r.num_prompt_tokens for r in replies)) if replies else 0,
        peak_memory_bytes=peak_memory_bytes,
    )


def window_figures(rounds: Sequence[Windows], peak_memory_bytes: int | None = None) -> WindowFigures:
    """Figures of one target; `rounds` has at least one."""
    plain, pictures = [r.plain for r in rounds], [r.pictures for r in rounds]
    asked = [outcome for window in pictures for outcome in window.pictures]
    tokens_plain = Spread.of([_tokens_within(window) for window in plain])
    tokens_pictures = Spread.of([_tokens_within(window) for window in pictures])
    gap_plain = Percentiles.of(gap for window in plain for gap in _gaps_within(window))
    gap_pictures = Percentiles.of(gap for window in pictures for gap in _gaps_within(window))
    return WindowFigures(
        failures=Failures.among([*asked, *(o for window in (*plain, *pictures) for o in window.texts)]),
        tokens_plain=tokens_plain,
        tokens_pictures=tokens_pictures,
        tokens_kept=tokens_pictures.median / tokens_plain.median if tokens_plain.median else 0.0,
        gap_plain_s=gap_plain,
        gap_pictures_s=gap_pictures,
        gap_ratio=gap_pictures.p99 / gap_plain.p99 if gap_plain and gap_pictures else None,
        first_token_plain_s=Percentiles.of(r.first_token_s for window in plain for r in _replies(window.texts)),
        first_token_pictures_s=Percentiles.of(r.first_token_s for window in pictures for r in _replies(window.texts)),
        picture_first_token_s=Percentiles.of(r.first_token_s for r in _replies(asked)),
        num_pictures=len(_replies(asked)),
        peak_memory_bytes=peak_memory_bytes,
    )


def _replies(outcomes: Iterable[Outcome]) -> list[Reply]:
    return [outcome for outcome in outcomes if isinstance(outcome, Reply)]


def _tokens_within(window: Window) -> float:
    """Text tokens that arrived before the window closed; of a reply that it cut, the share of its events."""
    end_s = window.start_s + window.seconds
    return sum(
        reply.tokens_per_event * sum(time_s <= end_s for time_s in reply.text_times_s)
        for reply in _replies(window.texts)
    )


def _gaps_within(window: Window) -> list[float]:
    """Gaps that began in the window: a stall that outlasts it counts whole."""
    end_s = window.start_s + window.seconds
    return [
        gap
        for reply in _replies(window.texts)
        for begin_s, gap in zip(reply.text_times_s, reply.gaps_s, strict=False)
        if begin_s <= end_s
    ]
