"""The bench against stand-ins on loopback: who is asked what, in which order, and what a failure does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dashinfer_vlm.bench.config import ServeBench
from dashinfer_vlm.bench.figures import BatchFigures, WindowFigures
from dashinfer_vlm.bench.serve import measure
from dashinfer_vlm.bench.target import BenchError, Target, parse_target
from dashinfer_vlm.errors import ConfigError
from tests.bench.stand_in import Script, served

SMALL = ServeBench(
    targets=(), workload="single", clients=2, requests=4, warmup=0, output_tokens=4, prompt_words=3, image_size=(28, 28)
)


async def run(config: ServeBench, *scripts: Script, **changes: Any) -> list[BatchFigures | WindowFigures]:
    if not scripts:
        return [one.figures() for one in await measure(replace(config, **changes))]
    first, *rest = scripts
    with served(first) as url:
        more = replace(config, targets=(*config.targets, parse_target(f"{first.name}={url}")))
        return await run(more, *rest, **changes)


async def test_targets_take_turns_and_get_the_same_requests() -> None:
    order: list[str] = []
    ours, peer = Script("ours", order=order), Script("peer", order=order)

    results = await run(SMALL, ours, peer, rounds=2)

    assert order == ["ours"] * 4 + ["peer"] * 4 + ["ours"] * 4 + ["peer"] * 4
    sent = [[str(body["messages"]) for body in script.seen] for script in (ours, peer)]
    assert set(sent[0]) == set(sent[1])
    assert len(set(sent[0])) == 8  # no request of the first round came again in the second
    assert {body["model"] for body in peer.seen} == {"model of peer"}
    assert [(r.num_replies, r.failures.num) for r in results if isinstance(r, BatchFigures)] == [(8, 0)] * 2


async def test_as_many_requests_run_at_once_as_there_are_clients() -> None:
    script = Script(gather=3)

    await run(SMALL, script, clients=3, requests=9, rounds=1)

    assert script.most_at_once == 3


async def test_tokens_are_counted_by_usage_when_an_event_holds_several() -> None:
    (figures,) = await run(SMALL, Script(tokens_per_event=3), rounds=1)

    assert isinstance(figures, BatchFigures)
    assert figures.output_tokens_per_s.median == pytest.approx(4 * figures.requests_per_s.median)
    assert figures.gap_s is not None
    assert figures.gap_s.num == 4  # two events with text in each of four answers


async def test_the_turns_of_a_conversation_follow_each_other() -> None:
    script = Script()

    (figures,) = await run(SMALL, script, workload="multi", requests=6, rounds=1)

    assert isinstance(figures, BatchFigures)
    assert [turn and turn.num for turn in figures.first_token_s_by_turn] == [2, 2, 2]
    first_words = [str(body["messages"][0]) for body in script.seen]
    lengths: dict[str, list[int]] = {}
    for words, body in zip(first_words, script.seen, strict=True):
        lengths.setdefault(words, []).append(len(body["messages"]))
    assert list(lengths.values()) == [[1, 3, 5]] * 2


async def test_failed_requests_are_told_apart_and_the_rest_is_measured() -> None:
    (figures,) = await run(SMALL, Script(fail=frozenset({1, 2})), rounds=1)

    assert isinstance(figures, BatchFigures)
    assert figures.num_replies == 2
    assert figures.failures.reasons == {
        "HTTP 503: no room for request 1": 1,
        "HTTP 503: no room for request 2": 1,
    }


async def test_answers_of_another_length_are_failures() -> None:
    (figures,) = await run(SMALL, Script(short_by=1), rounds=1)

    assert isinstance(figures, BatchFigures)
    assert figures.num_replies == 0
    assert list(figures.failures.reasons) == ["3 tokens came where 4 were asked for (ignore_eos)"]


async def test_warm_up_is_sent_before_the_first_round_and_not_counted() -> None:
    script = Script()

    (figures,) = await run(SMALL, script, warmup=3, rounds=2)

    assert len(script.seen) == 3 + 4 + 1 + 4
    assert isinstance(figures, BatchFigures)
    assert figures.num_replies == 8


async def test_a_target_that_fails_its_warm_up_ends_the_run_with_its_reason() -> None:
    with pytest.raises(BenchError, match="peer fails to warm up: HTTP 503: no room for request 0"):
        await run(SMALL, Script("peer", fail=frozenset({0})), warmup=2)


async def test_pictures_arrive_beside_streams_in_the_second_window_only() -> None:
    script = Script()

    (figures,) = await run(SMALL, script, workload="mixed", rounds=1, seconds=0.4, every=0.1, image_size=(56, 28))

    with_picture = [isinstance(body["messages"][0]["content"], list) for body in script.seen]
    assert sum(with_picture) == 4
    assert isinstance(figures, WindowFigures)
    assert (figures.num_pictures, figures.failures.num) == (4, 0)
    assert figures.tokens_plain.median > 0
    assert figures.gap_pictures_s is not None
    assert not any(with_picture[: int(figures.tokens_plain.median) // 4])


async def test_a_stream_whose_request_fails_ends_there() -> None:
    script = Script(fail=frozenset(range(10_000)))

    (figures,) = await run(SMALL, script, workload="mixed", rounds=1, seconds=0.2, every=0.1)

    assert figures.failures.num == len(script.seen) == 2 * SMALL.clients + 2


async def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(
        BenchError, match=r"gone does not tell its models at http://127\.0\.0\.1:9/v1/models: ConnectError"
    ):
        await measure(replace(SMALL, targets=(Target("gone", "http://127.0.0.1:9/v1"),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ()}, "no --target"),
        ({"targets": (Target("a", "x"), Target("a", "y"))}, "same name"),
        ({"clients": 0}, "--clients is 0"),
        ({"requests": 4, "workload": "multi"}, "multiple of its 3 turns"),
        ({"output_tokens": 1}, "--output-tokens is 1; it must be at least 2"),
        ({"image_size": (448, 20)}, "--image-size is 20"),
        ({"seconds": float("nan")}, "--seconds is nan"),
        ({"pids": {"b": 1}}, "--pid names 'b'"),
        ({"pause_idle": True}, "--pid of every target"),
    ],
)
def test_what_cannot_be_measured_with_is_refused(changes: dict[str, Any], message: str) -> None:
    config = replace(SMALL, targets=(Target("a", "x"),))
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes).validate()


@pytest.mark.parametrize("text", ["=http://x", "a=localhost:8000", "a=", "localhost:8000"])
def test_a_target_needs_a_name_and_a_url(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=URL"):
        parse_target(text)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_a_url_may_end_in_v1_or_not(url: str) -> None:
    assert parse_target(f"a={url}") == Target("a", "http://h:1/v1")


def test_a_url_alone_is_named_by_its_host_and_port() -> None:
    assert parse_target("https://h:1/v1") == Target("h:1", "https://h:1/v1")
