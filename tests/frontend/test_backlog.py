"""What may wait for the engine, and how long clients are told to stay away."""

from __future__ import annotations

import pytest

from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.frontend.backlog import ANY_LOAD, Backlog, Flow, Load, QueueLimits
from dashinfer_vlm.frontend.prompt import Prompt
from dashinfer_vlm.request import Item
from dashinfer_vlm.shared_array import SharedArray


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(backlog: Backlog, load: Load) -> OverloadedError | None:
    try:
        backlog.check(load)
    except OverloadedError as error:
        return error
    return None


def picture(content: bytes, num_tokens: int = 6) -> Item:
    patches = SharedArray("nowhere", (4 * num_tokens, 1176), "|u1")
    return Item(kind="image", start=0, num_tokens=num_tokens, content_hash=content * 32, patches=patches)


def test_a_rate_is_what_left_by_the_time_in_which_something_waited(clock: Clock) -> None:
    flow = Flow(clock)
    assert flow.seconds(100) == 0.0, "nothing is known yet"
    clock.now_s += 1000  # nothing waits: no time of the flow
    flow.add(100)
    clock.now_s += 5
    flow.leave(50, served=True)
    assert flow.seconds(100) == pytest.approx(10.0)
    flow.leave(50, served=False)
    assert flow.seconds(100) == pytest.approx(10.0), "what nobody wanted any more was not served"
    clock.now_s += 1000
    assert flow.seconds(100) == pytest.approx(10.0)


def test_the_rate_follows_what_happens_now(clock: Clock) -> None:
    flow = Flow(clock)
    for per_s in (100, 10):
        for _ in range(600):
            flow.add(per_s)
            clock.now_s += 1
            flow.leave(per_s, served=True)
    assert flow.seconds(100) == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize(
    ("limits", "load", "reason", "told"),
    [
        (
            QueueLimits(tokens=100),
            Load(tokens=60),
            "queued_tokens",
            "60 tokens of prompts wait, and with these 60 more",
        ),
        (QueueLimits(visual_tokens=100), Load(60, 60, 240), "queued_visual_tokens", "over the limit of 100"),
    ],
)
def test_beyond_a_limit_a_request_is_told_when_to_come_back(
    clock: Clock, limits: QueueLimits, load: Load, reason: str, told: str
) -> None:
    backlog = Backlog(limits, clock)
    for _ in range(2):  # two tokens a second
        backlog.enter(load)
        clock.now_s += 30
        backlog.leave(load, served=True)
    backlog.enter(load)
    refused = refusal(backlog, load)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == (reason, 10)
    assert told in str(refused)
    assert refusal(backlog, Load(40, 40, 0)) is None, "what fits is taken"
    backlog.leave(load, served=False)
    assert refusal(backlog, Load(1000, 1000, 1000)) is None, "where nothing waits there is room"


def test_pictures_are_bounded_by_the_time_that_they_are_expected_to_take(clock: Clock) -> None:
    backlog, load = Backlog(QueueLimits(encoder_s=60.0), clock), Load(10, 10, 300)
    backlog.enter(load)
    assert refusal(backlog, Load(10, 10, 10**9)) is None, "nothing is known yet"
    clock.now_s += 30  # ten patches a second
    backlog.leave(load, served=True)
    backlog.enter(load)
    assert backlog.encoder_s == pytest.approx(30.0)
    assert refusal(backlog, load) is None
    backlog.enter(load)
    refused = refusal(backlog, load)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == ("queued_encoder_s", 30)
    assert refusal(backlog, Load(tokens=10)) is None, "texts do not wait for it"


def test_a_full_backlog_refuses_before_anything_is_fetched(clock: Clock) -> None:
    backlog = Backlog(QueueLimits(tokens=100), clock)
    backlog.enter(Load(tokens=100))
    refused = refusal(backlog, ANY_LOAD)
    assert refused is not None
    assert refused.retry_after_s == 1, "nothing is known yet"


def test_no_client_is_told_to_stay_away_for_hours(clock: Clock) -> None:
    backlog = Backlog(QueueLimits(tokens=100), clock)
    backlog.enter(Load(tokens=10))
    clock.now_s += 3600
    backlog.leave(Load(tokens=10), served=True)
    backlog.enter(Load(tokens=100))
    refused = refusal(backlog, Load(tokens=100))
    assert refused is not None
    assert refused.retry_after_s == 600


def test_the_load_of_a_call_counts_equal_pictures_once_for_the_encoder() -> None:
    prompts = [Prompt([1] * 20, (picture(b"a"), picture(b"a"), picture(b"b"))), Prompt([1] * 5)]
    assert Load.of(prompts) == Load(tokens=25, visual_tokens=18, patches=48)
