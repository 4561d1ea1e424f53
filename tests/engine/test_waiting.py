"""Tenants take turns, whatever each of them has waiting."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.waiting import WaitingLine
from dashinfer_vlm.request import Request
from tests.engine.test_scheduler import carry_out, make_scheduler


def sequence(
    tenant: str, name: str = "", *, num_prompt: int = 4, weight: float = 1.0, max_tokens: int = 4, priority: int = 0
) -> Sequence:
    prompt = [hash((tenant, name, i)) % 90 for i in range(num_prompt)]
    request = Request(id=f"{tenant}{name}", prompt_ids=prompt, tenant=tenant, weight=weight, priority=priority)
    positions = torch.arange(num_prompt).expand(3, -1)
    return Sequence(request, positions=positions, offset=0, max_tokens=max_tokens, seed=0)


def order(line: WaitingLine, cost: int = 1) -> str:
    """Ids in the order of their turns, each charged `cost`."""
    ids = []
    while line:
        taken = line.first()
        line.remove(taken)
        line.charge(taken, cost)
        ids.append(taken.id)
    return " ".join(ids)


def line_of(*sequences: Sequence) -> WaitingLine:
    line = WaitingLine()
    for each in sequences:
        line.add(each)
    return line


def test_one_tenant_is_served_in_order_of_arrival_and_preempted_ones_first() -> None:
    line = line_of(*(sequence("a", str(i)) for i in range(4)))
    line.put_back(sequence("a", "running"))
    assert order(line) == "arunning a0 a1 a2 a3"


def test_priority_goes_first_within_a_tenant_and_not_before_others() -> None:
    line = line_of(sequence("a", "0"), sequence("b", "0"), sequence("a", "1", priority=-5), sequence("a", "2"))
    line.put_back(sequence("a", "running", priority=3))
    line.put_back(sequence("a", "first"))
    assert order(line) == "a1 b0 afirst a0 a2 arunning"


def test_who_sends_one_request_is_not_behind_all_of_who_sent_many() -> None:
    line = line_of(*(sequence("a", str(i)) for i in range(4)), sequence("b", "0"), sequence("b", "1"))
    assert order(line) == "a0 b0 a1 b1 a2 a3"


def test_a_weight_is_a_share() -> None:
    many = [sequence(tenant, weight=weight) for tenant, weight in (("a", 3.0), ("b", 1.0)) for _ in range(40)]
    assert Counter(order(line_of(*many)).split()[:40]) == {"a": 30, "b": 10}


def test_long_requests_count_for_more_than_short_ones() -> None:
    line = line_of(*(sequence(tenant, str(i)) for tenant in "ab" for i in range(4)))
    turns = []
    for _ in range(6):
        taken = line.first()
        line.remove(taken)
        line.charge(taken, 30 if taken.request.tenant == "a" else 10)
        turns.append(taken.request.tenant)
    assert "".join(turns) == "abbbab"


def test_time_without_requests_is_not_saved_up() -> None:
    line = line_of(*(sequence("a", str(i)) for i in range(50)))
    for _ in range(40):
        line.charge(taken := line.first(), 10)
        line.remove(taken)
    for i in range(10):
        line.add(sequence("b", str(i)))
    assert Counter(each[0] for each in order(line, 10).split()[:10]) == {"a": 5, "b": 5}


def test_meters_of_tenants_that_have_gone_are_forgotten() -> None:
    line = line_of(*(sequence("a") for _ in range(101)))
    for i in range(100):
        line.add(sequence(f"t{i}"))
        for _ in range(2):
            taken = line.first()
            line.remove(taken)
            line.charge(taken, 1)
    assert len(line) == 1
    assert len(line._meters) <= 3


def test_what_is_used_while_nobody_waits_is_not_held_against_a_tenant() -> None:
    line = WaitingLine()
    line.charge(sequence("a"), 1000)
    for tenant in "aabb":
        line.add(sequence(tenant))
    assert order(line) == "a b a b"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["add", "take", "put back", "leave"])), max_size=60))
def test_nothing_is_lost_and_nobody_twice(steps: list[tuple[str, str]]) -> None:
    line = WaitingLine()
    waiting: list[Sequence] = []
    taken: list[Sequence] = []
    for number, (tenant, what) in enumerate(steps):
        if what == "add":
            waiting.append(each := sequence(tenant, str(number)))
            line.add(each)
        elif what == "put back" and taken:
            waiting.append(each := taken.pop())
            line.put_back(each)
        elif waiting:
            each = line.first() if what == "take" else waiting[number % len(waiting)]
            line.remove(each)
            waiting.remove(each)
            taken.append(each)
            line.charge(each, number)
        assert len(line) == len(waiting)
        assert set(line) == set(waiting)


def test_a_full_scheduler_gives_its_places_to_tenants_in_turns() -> None:
    """Of one who came first with twenty requests, and one who came later with four."""
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(20):
        scheduler.add(sequence("a", str(i)))
    carry_out(scheduler, scheduler.schedule())
    for i in range(4):
        scheduler.add(sequence("b", str(i)))
    ended: list[str] = []
    while scheduler.running or scheduler.waiting:
        for each in [s for s in scheduler.running if s.num_output >= s.max_tokens]:
            scheduler.remove(each)
            ended.append(each.request.tenant)
        carry_out(scheduler, scheduler.schedule())
    assert Counter(ended[:10]) == {"a": 6, "b": 4}
    scheduler.check_integrity()
