"""Nested spans: every second is counted once, under the innermost name."""

from __future__ import annotations

import pytest

from dashinfer_vlm.bench.spans import Part, Spans, replaced


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_span_counts_without_the_spans_inside_it() -> None:
    clock = Clock()
    spans = Spans(clock=clock)

    with spans.phase("decode"), spans.span("outer"):
        clock.now += 1
        for _ in range(2):
            with spans.span("inner", num_bytes=10, num_flops=20):
                clock.now += 3
                with spans.span("innermost"):
                    clock.now += 4
        clock.now += 5

    assert spans.take("decode") == {
        "innermost": Part(8.0, 0, 0, 2),
        "inner": Part(6.0, 20, 40, 2),
        "outer": Part(6.0, 0, 0, 1),
    }
    assert spans.take("decode") == {}


def test_phases_are_apart() -> None:
    clock = Clock()
    spans = Spans(clock=clock)
    call = spans.timed("call", lambda seconds: setattr(clock, "now", clock.now + seconds))

    call(9)
    with spans.phase("a"):
        call(1)
    with spans.phase("b"):
        call(2)

    assert [spans.take(name) for name in ("other", "a", "b")] == [
        {"call": Part(9, 0, 0, 1)},
        {"call": Part(1, 0, 0, 1)},
        {"call": Part(2, 0, 0, 1)},
    ]


def test_a_span_that_raises_is_counted_and_closed() -> None:
    clock = Clock()
    spans = Spans(clock=clock)

    def fail() -> None:
        clock.now += 1
        raise ValueError("oops")

    with spans.span("outer"):
        with pytest.raises(ValueError, match="oops"):
            spans.timed("inner", fail)()
        clock.now += 2

    assert spans.take("other") == {"outer": Part(2, 0, 0, 1), "inner": Part(1, 0, 0, 1)}


def test_both_ends_of_a_span_wait_for_the_device() -> None:
    waits: list[float] = []
    clock = Clock()
    spans = Spans(clock=clock, sync=lambda: waits.append(clock.now))

    with spans.span("kernel"):
        clock.now += 1

    assert waits == [0.0, 1.0]


def test_what_is_replaced_comes_back() -> None:
    clock = Clock()

    with replaced(clock, "now", 5.0):
        assert clock.now == 5.0

    assert clock.now == 0.0


def test_what_is_not_there_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError), replaced(Clock(), "other", 1):
        pass
