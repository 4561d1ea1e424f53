"""The loop: every accepted request gets exactly one final Output, whatever the engine does."""

from __future__ import annotations

import threading
from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashinfer_vlm.engine.host.loop import MAX_FAILURES, EngineLoop
from dashinfer_vlm.engine.host.wire import (
    Abort,
    AskStats,
    Close,
    Command,
    Event,
    Failed,
    Outputs,
    Refused,
    StatsReply,
)
from dashinfer_vlm.request import FinishReason, Item, Output, Request
from dashinfer_vlm.shared_array import put
from tests.engine.scripted import Script, ScriptedEngine


class ScriptedChannel:
    """Hands out one batch of commands per turn; says Close once all are done and the engine is idle."""

    def __init__(self, *batches: list[Command]) -> None:
        self.batches = deque(batches)
        self.events: list[Event] = []
        self.num_waits = 0

    def receive(self, *, wait: bool) -> list[Command]:
        self.num_waits += wait
        if self.batches:
            return self.batches.popleft()
        return [Close()] if wait else []

    def send(self, event: Event) -> None:
        self.events.append(event)

    def outputs(self) -> list[Output]:
        return [output for event in self.events if isinstance(event, Outputs) for output in event.outputs]

    def endings(self) -> dict[str, FinishReason]:
        finished = [output for output in self.outputs() if output.finish]
        assert max(Counter(output.request_id for output in finished).values(), default=1) == 1
        return {output.request_id: output.finish.reason for output in finished if output.finish}


def run(*batches: list[Command], engine: ScriptedEngine | None = None) -> ScriptedChannel:
    channel = ScriptedChannel(*batches)
    EngineLoop(engine or ScriptedEngine(), channel).run()
    return channel


def ask(name: str, first: int, items: tuple[Item, ...] = ()) -> Request:
    return Request(id=name, prompt_ids=[first], items=items)


def test_each_request_gets_its_tokens_and_one_ending() -> None:
    channel = run([ask("a", 3), ask("b", 1)], [ask("c", 2)])
    assert channel.endings() == {"a": "length", "b": "length", "c": "length"}
    assert [o.token_ids for o in channel.outputs() if o.request_id == "a"] == [(1,), (2,), (3,)]


def test_the_news_of_a_step_travel_in_one_message() -> None:
    channel = run([ask("a", 2), ask("b", 2), ask("c", 2)])
    assert [len(event.outputs) for event in channel.events if isinstance(event, Outputs)] == [3, 3]


class NarrowChannel(ScriptedChannel):
    """Cannot send the ending of the request "wide"."""

    def send(self, event: Event) -> None:
        if isinstance(event, Outputs) and any(o.request_id == "wide" and o.token_ids for o in event.outputs):
            raise ValueError("too wide")
        super().send(event)


def test_news_that_cannot_be_sent_end_their_requests_and_not_the_engine() -> None:
    channel = NarrowChannel([ask("wide", 1), ask("a", 1)], [ask("late", 2)])
    EngineLoop(ScriptedEngine(), channel).run()
    assert channel.endings() == {"wide": "error", "a": "error", "late": "length"}


def test_an_idle_loop_waits_for_commands_and_does_not_step() -> None:
    engine = ScriptedEngine()
    channel = run([], [], [ask("a", 1)], [], engine=engine)
    assert engine.num_steps == 1
    assert channel.num_waits == 5  # before each of the four batches, none of which finds work, and before Close


@pytest.mark.parametrize(
    ("first", "kind", "param", "retry_after_s"),
    [
        (Script.REFUSE_LENGTH, "ContextLengthError", "messages", 1),
        (Script.REFUSE_LOAD, "OverloadedError", None, 7),
        (Script.CRASH_ADD, "EngineError", None, 1),
    ],
)
def test_a_refused_request_is_told_why_and_harms_nobody(
    first: int, kind: str, param: str | None, retry_after_s: int
) -> None:
    channel = run([ask("a", 2), ask("bad", first)])
    [refused] = [event for event in channel.events if isinstance(event, Refused)]
    assert (refused.request_id, refused.fault.kind) == ("bad", kind)
    assert (refused.fault.param, refused.fault.retry_after_s) == (param, retry_after_s)
    assert channel.endings() == {"a": "length"}


def test_an_id_that_is_in_use_is_refused() -> None:
    channel = run([ask("a", 3), ask("a", 1)])
    assert [event.request_id for event in channel.events if isinstance(event, Refused)] == ["a"]
    assert channel.endings() == {"a": "length"}


def test_an_aborted_request_ends_once_and_unknown_ids_are_ignored() -> None:
    channel = run([ask("a", Script.ENDLESS)], [Abort("a"), Abort("unknown")])
    assert channel.endings() == {"a": "abort"}


def test_closing_ends_what_still_runs() -> None:
    engine = ScriptedEngine()
    channel = run([ask("a", Script.ENDLESS), ask("b", Script.ENDLESS)], [Close()], engine=engine)
    assert channel.endings() == {"a": "abort", "b": "abort"}
    assert not engine.has_work()


def test_statistics_carry_their_ticket() -> None:
    channel = run([ask("a", Script.ENDLESS), AskStats(41)], [Close()])
    [reply] = [event for event in channel.events if isinstance(event, StatsReply)]
    assert (reply.ticket, reply.stats.num_running) == (41, 1)


def test_a_failed_step_ends_its_requests_and_the_next_one_is_served() -> None:
    channel = run([ask("a", 5), ask("poison", Script.CRASH_STEP)], [ask("b", 1)])
    assert channel.endings() == {"a": "error", "poison": "error", "b": "length"}
    [message] = {o.finish.message for o in channel.outputs() if o.finish and o.finish.reason == "error"}
    assert message is not None
    assert "ZeroDivisionError" in message
    assert "scripted" not in message  # what an exception says may be private


def test_tokens_between_failures_keep_the_engine_alive() -> None:
    poison: list[list[Command]] = [[ask(f"p{i}", Script.CRASH_STEP)] for i in range(MAX_FAILURES)]
    good: list[list[Command]] = [[ask(f"g{i}", 1)] for i in range(MAX_FAILURES)]
    channel = run(*[batch for pair in zip(poison, good, strict=True) for batch in pair])
    assert not [event for event in channel.events if isinstance(event, Failed)]
    assert [name for name, reason in channel.endings().items() if reason == "length"] == ["g0", "g1", "g2"]


def test_an_engine_that_keeps_failing_is_declared_dead() -> None:
    poison: list[list[Command]] = [[ask(f"p{i}", Script.CRASH_STEP)] for i in range(MAX_FAILURES)]
    channel = run(*poison, [ask("late", 1)])
    assert set(channel.endings().values()) == {"error"}
    assert isinstance(channel.events[-1], Failed)
    assert channel.events[-1].fault.kind == "EngineDeadError"
    assert "late" not in channel.endings()


def test_shared_patches_are_mapped_before_their_owner_removes_them(tmp_path: Path) -> None:
    shared = put(tmp_path, np.full((4, 3), 5, np.uint8))
    item = Item(kind="image", start=0, num_tokens=1, content_hash=b"x" * 32, grid=(1, 2, 2), patches=shared)

    class Removing(ScriptedEngine):
        def add(self, request: Request, prepared: Future[Any] | None = None) -> None:
            super().add(request)
            shared.remove()

    channel = run([ask("a", Script.ECHO_ITEMS, (item,))], engine=Removing())
    assert [output.token_ids for output in channel.outputs()] == [(60,)]


def test_patches_that_were_removed_too_early_fail_their_request_alone(tmp_path: Path) -> None:
    shared = put(tmp_path, np.zeros((4, 3), np.uint8))
    shared.remove()
    item = Item(kind="image", start=0, num_tokens=1, content_hash=b"x" * 32, grid=(1, 2, 2), patches=shared)
    channel = run([ask("a", Script.ECHO_ITEMS, (item,)), ask("b", 1)])
    [refused] = [event for event in channel.events if isinstance(event, Refused)]
    assert (refused.request_id, refused.fault.kind) == ("a", "EngineError")
    assert channel.endings() == {"b": "length"}


class Prepared:
    """An engine for which the request "slow" is prepared once `num_steps` steps for others are done, if ever."""

    def __init__(self, num_steps: int | None) -> None:
        self.engine = ScriptedEngine()
        self.ready: Future[None] = Future()
        self.engine.preparing["slow"] = self.ready
        step = self.engine.step

        def counted() -> list[Output]:
            if self.engine.num_steps == num_steps and not self.ready.done():
                self.ready.set_result(None)
            return step()

        self.engine.step = counted  # type: ignore[method-assign]


def test_others_go_on_while_a_request_is_prepared() -> None:
    channel = run([ask("slow", 2), ask("b", 4)], engine=Prepared(2).engine)
    assert channel.endings() == {"slow": "length", "b": "length"}
    first = [o.request_id for o in channel.outputs()].index("slow")
    assert first >= 2, "it was added before it was ready"


def test_a_request_is_prepared_while_nothing_else_runs() -> None:
    prepared = Prepared(None)
    threading.Timer(0.05, prepared.ready.set_result, [None]).start()
    assert run([ask("slow", 2)], engine=prepared.engine).endings() == {"slow": "length"}


def test_what_is_wrong_with_a_prepared_request_is_a_refusal() -> None:
    prepared = Prepared(None)
    prepared.ready.set_result(None)
    channel = run([ask("slow", Script.REFUSE_LENGTH)], [ask("slow", 1)], engine=prepared.engine)
    refusals = [event for event in channel.events if isinstance(event, Refused)]
    assert [refusal.fault.kind for refusal in refusals] == ["ContextLengthError"]
    assert channel.endings() == {"slow": "length"}, "its name was not free again"


def test_a_request_is_aborted_while_it_is_prepared() -> None:
    prepared = Prepared(1)
    channel = run([ask("slow", 2), ask("b", 3)], [Abort("slow")], engine=prepared.engine)
    assert channel.endings() == {"slow": "abort", "b": "length"}
    assert "slow" not in prepared.engine.aborted


@pytest.mark.parametrize("others", [[], ["also"]])
def test_what_is_prepared_for_nobody_any_more_is_cancelled(others: list[str]) -> None:
    prepared = Prepared(None)
    prepared.engine.preparing["also"] = prepared.ready
    run([ask("slow", 2), *(ask(name, 2) for name in others)], [Abort("slow")], [Close()], engine=prepared.engine)
    assert prepared.ready.cancelled() == (not others)


def test_a_request_that_is_prepared_when_the_loop_is_closed_ends_by_it() -> None:
    channel = run([ask("slow", 2)], [Close()], engine=Prepared(None).engine)
    assert channel.endings() == {"slow": "abort"}
