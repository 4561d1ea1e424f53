"""The engine's seconds by what they were spent on."""

from __future__ import annotations

import time

import pytest

from dashinfer_vlm.engine import engine as engine_module
from dashinfer_vlm.engine.cost import CardCost, StepCost
from dashinfer_vlm.engine.steps import Plan
from dashinfer_vlm.engine.times import StepTimes, streams_label
from dashinfer_vlm.request import Request
from tests.engine.runners import RUNNERS
from tests.engine.test_engine import greedy, make_engine, run
from tests.engine.test_scheduler import arrive, make_scheduler, stream


def mixed_plan(num_streams: int, num_prompt: int) -> Plan:
    """A step with streams, and a prompt beside them."""
    scheduler = make_scheduler()
    for i in range(num_streams):
        stream(scheduler, f"stream {i}")
    arrive(scheduler, "prompt", num_prompt)
    plan = scheduler.schedule()
    assert [chunk.is_decode for chunk in plan.chunks] == [True] * num_streams + [False]
    return plan


def test_a_step_is_divided_as_the_estimates_say_after_the_choice_of_tokens() -> None:
    plan, found = mixed_plan(2, 4), StepTimes()
    found.add(plan, 10.0, 1.0, StepCost(fixed_s=3.0, token_s=0.5))  # 3 + 2 rows of 0.5, and 4 tokens of 0.5

    assert plan.num_tokens == 6
    assert (found.sampling_s, found.prefill_s) == pytest.approx((1.0, 3.0))
    assert found.decode_s == pytest.approx({2: 6.0})
    assert found.decode_steps == {2: 1}


def test_prompts_alone_are_no_decode() -> None:
    scheduler, found = make_scheduler(), StepTimes()
    arrive(scheduler, "prompt", 5)
    found.add(scheduler.schedule(), 2.0, 0.5, StepCost(1.0, 1.0))

    assert (found.prefill_s, dict(found.decode_s), dict(found.decode_steps)) == (1.5, {}, {})


@pytest.mark.parametrize(
    "cost", [StepCost(0.0, 0.0), CardCost(1.0, 0.01, decode_sizes=(8,), mixed_sizes=(16, 64)), StepCost(1.0, 0.1)]
)
@pytest.mark.parametrize(("rows", "joining"), [(0, 7), (3, 0), (3, 7)])
def test_no_second_is_lost_or_counted_twice(cost: StepCost, rows: int, joining: int) -> None:
    decode_s, prefill_s = cost.split(2.0, rows, joining)

    assert decode_s + prefill_s == pytest.approx(2.0)
    assert min(decode_s, prefill_s) >= 0.0
    assert (prefill_s == 0.0) >= (joining == 0)
    assert (decode_s == 0.0) >= (rows == 0)


def test_many_streams_share_few_labels() -> None:
    assert [streams_label(n) for n in (1, 7, 8, 9, 16, 17, 128)] == [1, 7, 8, 16, 16, 32, 128]


def test_time_with_nothing_to_do_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = StepTimes()
    found.begin()
    found.end(goes_on=True)
    found.begin()  # the clock is not asked: it has been busy since the last step
    found.end(goes_on=False)
    found.begin()
    found.end(goes_on=False)

    assert found.busy_s == 2.5 + 0.25


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_engines_parts_add_up_to_its_steps(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "make_runner", RUNNERS[runner])
    engine = make_engine()
    run(engine, *(Request(id=name, prompt_ids=[5, 6, 7], params=greedy(4)) for name in "abc"))
    stats = engine.stats()

    parts = stats.prefill_seconds_total + stats.sampling_seconds_total + sum(stats.decode_seconds_total.values())
    assert parts == pytest.approx(stats.step_seconds_total)
    assert stats.prefill_seconds_total > 0.0
    assert stats.decode_steps_total == {3: 3}  # the first of four tokens comes with the prompt
    assert stats.busy_seconds_total > stats.step_seconds_total
