"""Where the engine says that a request's time went."""

from __future__ import annotations

import time

import pytest

from dashinfer_vlm.request import Output, Request
from dashinfer_vlm.stages import Span, since, timed
from tests.engine.scripted_model import ScriptedModel
from tests.engine.test_engine import greedy, image, make_engine, run


def spans(outputs: list[Output]) -> dict[str, Span]:
    told = [span for output in outputs for span in output.spans]
    found: dict[str, Span] = {span.stage: span for span in told}
    assert len(found) == len(told), "a stage was told twice"
    assert all(span.seconds >= 0 for span in told)
    return found


def test_a_request_of_text_waits_and_is_read() -> None:
    start_s = time.perf_counter()
    found = spans(run(make_engine(), Request(id="a", prompt_ids=[1, 2, 3], params=greedy()))["a"])
    assert list(found) == ["prefill_wait", "prefill"]
    assert start_s <= found["prefill_wait"].start_s
    assert found["prefill_wait"].end_s == found["prefill"].start_s
    assert found["prefill"].end_s <= time.perf_counter()


def test_stages_are_told_with_the_first_token() -> None:
    outputs = run(make_engine(), Request(id="a", prompt_ids=[1, 2, 3], params=greedy(max_tokens=5)))["a"]
    assert outputs[0].spans
    assert outputs[0].token_ids
    assert not any(output.spans for output in outputs[1:])


def test_a_picture_is_waited_for_by_those_who_were_there_and_by_nobody_later() -> None:
    engine = make_engine(model=ScriptedModel())
    first = Request(id="a", prompt_ids=[1, *[2] * 4, 3], items=(image(1, 4),), params=greedy())
    again = Request(id="b", prompt_ids=[1, *[2] * 4, 3], items=(image(1, 4),), params=greedy())
    found = spans(run(engine, first)["a"])
    assert set(found) == {"prefill_wait", "encode_wait", "encode", "prefill"}
    assert found["encode_wait"].end_s == found["encode"].start_s
    assert found["encode"].end_s <= found["prefill"].end_s
    assert set(spans(run(engine, again)["b"])) == {"prefill_wait", "prefill"}


def test_who_joins_late_has_waited_for_the_rest_only() -> None:
    whole = [Span("encode_wait", 1.0, 2.0), Span("encode", 2.0, 5.0)]
    assert since(whole, 3.0) == [Span("encode", 3.0, 5.0)]
    assert since(whole, 5.0) == []


def test_a_block_that_fails_has_no_time() -> None:
    spans: list[Span] = []
    with pytest.raises(ValueError, match="no"), timed("fetch", spans):
        raise ValueError("no")
    assert spans == []
