"""Percentiles and rates are exact, and failures enter none of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashinfer_vlm.bench.clients import Batch, Window, Windows
from dashinfer_vlm.bench.events import Failure, Reply
from dashinfer_vlm.bench.figures import Percentiles, Spread, batch_figures, window_figures


def reply(sent_s: float, *text_times_s: float, tokens: int | None = None, turn: int = 0) -> Reply:
    return Reply(sent_s, text_times_s, text_times_s[-1], 7, tokens or len(text_times_s), turn)


def test_percentiles_interpolate_between_neighbours() -> None:
    found = Percentiles.of([3.0, 1.0, 2.0])

    assert found is not None
    assert (found.num, found.p50, found.p90, found.p99) == pytest.approx((3, 2.0, 2.8, 2.98))
    assert Percentiles.of([]) is None


def test_rates_are_of_a_round_and_latencies_of_all_requests() -> None:
    one = Batch((reply(0, 1, 2), reply(0, 3, 5)), wall_s=4.0)
    two = Batch((reply(0, 2, 3),), wall_s=1.0)

    figures = batch_figures([one, two])

    assert figures.requests_per_s == Spread(0.75, 0.5, 1.0)
    assert figures.output_tokens_per_s == Spread(1.5, 1.0, 2.0)
    assert figures.first_token_s is not None
    assert (figures.first_token_s.num, figures.first_token_s.p50) == (3, 2.0)
    assert figures.per_token_s is not None
    assert figures.per_token_s.p50 == 1.0


def test_a_failure_is_never_a_result() -> None:
    good = Batch((reply(0, 1, 2),), wall_s=2.0)
    bad = Batch((*good.outcomes, Failure(0.0, 0.001, "no room"), Failure(0.0, 0.001, "no room")), wall_s=2.0)

    figures = batch_figures([bad])

    assert figures.failures.num == 2
    assert figures.failures.reasons == {"no room": 2}
    assert replace(figures, failures=batch_figures([good]).failures) == batch_figures([good])


def test_only_failures_leave_no_latency_and_a_rate_of_nothing() -> None:
    figures = batch_figures([Batch((Failure(0.0, 1.0, "gone"),), wall_s=1.0)])

    assert figures.first_token_s is None
    assert figures.requests_per_s == Spread(0.0, 0.0, 0.0)


def test_turns_are_told_apart() -> None:
    figures = batch_figures([Batch((reply(0, 1, 2), reply(0, 4, 5, turn=1)), wall_s=5.0)])

    assert [turn and turn.p50 for turn in figures.first_token_s_by_turn] == [1.0, 4.0]


def test_a_stall_that_outlasts_the_window_counts_whole_and_its_late_tokens_do_not() -> None:
    plain = Window(0.0, 10.0, (reply(0, 1, 2, 3, 4),), ())
    stalled = Window(0.0, 10.0, (reply(0, 1, 2, 30, 31),), (reply(2, 25, 26),))

    figures = window_figures([Windows(plain, stalled)])

    assert (figures.tokens_plain.median, figures.tokens_pictures.median, figures.tokens_kept) == (4, 2, 0.5)
    assert figures.gap_pictures_s == Percentiles.of([1.0, 28.0])
    assert figures.gap_pictures_s is not None
    assert figures.gap_ratio == figures.gap_pictures_s.p99  # alone every gap is 1 s
    assert figures.picture_first_token_s is not None
    assert figures.picture_first_token_s.p50 == 23.0


def test_tokens_of_a_cut_answer_are_its_events_times_what_an_event_holds() -> None:
    window = Window(0.0, 2.0, (reply(0, 1, 2, 3, 4, tokens=12),), ())

    assert window_figures([Windows(window, window)]).tokens_plain.median == 6.0
