"""The tools that prove what docs/reliability.md says notice what is wrong."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import rich_click as click

from dashinfer_vlm.cli.command import execute
from tests.conftest import ROOT
from trust import crowd, faults, soak
from trust.answers import Answer
from trust.crowd import Row, Stream
from trust.server import Metrics
from trust.soak import CHOICES, Soaked, Tally
from trust.stage import Seen, told
from trust.vitals import Vitals


@pytest.mark.parametrize(
    ("answer", "num_choices", "fault"),
    [
        (Answer(200, ["stop"], 1), 1, ""),
        (Answer(200, ["stop", "length"], 1), 2, ""),
        (Answer(200, ["error: engine_dead"], 0), 3, ""),
        (Answer(200, [], 0, has_left=True), 1, ""),
        (Answer(429, error="overloaded"), 1, ""),
        (Answer(200, ["stop"], 0), 1, "the end was told 0 times"),
        (Answer(200, ["stop"], 2), 1, "the end was told 2 times"),
        (Answer(200, ["stop", "stop"], 1), 1, "2 final events for 1 choices"),
        (Answer(200, [], 1), 1, "0 final events for 1 choices"),
        (Answer(200, ["stop", "error: x"], 0), 1, "an error and ['stop', 'error: x']"),
        (Answer(200, [], 0, error="ReadError"), 1, "broken off: ReadError"),
    ],
)
def test_an_accepted_request_ends_exactly_once(answer: Answer, num_choices: int, fault: str) -> None:
    assert answer.fault(num_choices) == fault


def metrics(**values: float) -> Metrics:
    idle = {f"dashinfer_engine_num_{name}": 0.0 for name in ("waiting", "running")}
    blocks = {"dashinfer_engine_num_blocks": 9.0, "dashinfer_engine_num_free_blocks": 9.0}
    found = Metrics({**idle, **blocks, "dashinfer_requests_in_flight": 0.0, **values})
    found.labelled = {CHOICES: 0.0}
    return found


def soaked(growth: dict[str, float] | None = None, **values: float) -> list[str]:
    """Broken promises of a soak in which something grew."""
    first = {"memory": 1000.0, "descriptors": 50, "threads": 20, "processes": 4, "shared": 0}
    vitals = [
        Vitals(
            at_s=i,
            memory_of_each={},
            **{name: value * (growth or {}).get(name, 1.0) ** (i / 29) for name, value in first.items()},
        )
        for i in range(30)
    ]
    return Soaked(1, Tally(), vitals, metrics(**values), metrics(), []).broken_promises()


def test_a_soak_in_which_nothing_grows_is_one() -> None:
    assert soaked() == []


@pytest.mark.parametrize(
    ("growth", "values", "words"),
    [
        ({"memory": 1.06}, {}, "memory grew"),
        ({"descriptors": 1.3}, {}, "descriptors grew"),
        ({"threads": 1.5}, {}, "threads grew"),
        ({}, {"dashinfer_engine_num_free_blocks": 8.0}, "1 blocks are held"),
        ({}, {"dashinfer_requests_in_flight": 1.0}, "dashinfer_requests_in_flight is 1 at the end"),
    ],
)
def test_a_soak_tells_what_grew_and_what_is_held(
    growth: dict[str, float], values: dict[str, float], words: str
) -> None:
    (promise,) = soaked(growth, **values)
    assert promise.startswith(words)


def test_what_clients_saw_is_counted_in_words() -> None:
    dead, refused = Answer(200, ["error: engine_dead"]), Answer(503, error="overloaded", retry_after="1")
    answers = [Answer(200, ["stop"], 1), dead, dead, refused, Answer(0, error="ReadError"), Answer(0, error="hung")]
    assert told(answers) == (
        "2 event `error: engine_dead`, 1 whole, 1 503 `overloaded` with `Retry-After`, 1 connection broken, 1 hung"
    )
    assert Seen(answers).num_hung == 1


def heard(*pieces: tuple[float, str]) -> Stream:
    """A stream to which text came at these times."""
    stream = Stream.__new__(Stream)
    stream.pieces = [(at_s, f'data: {{"content":"{text}"}}'.encode()) for at_s, text in pieces]
    return stream


def test_a_token_is_late_by_the_time_since_its_step_and_only_the_window_counts() -> None:
    stamps = [float(step) for step in range(200)]
    assert heard((5.1, "f"), (6.2, "g"), (8.5, "hi"), (9.1, "j")).delays(stamps, 6.0, 9.0) == pytest.approx(
        [0.2, 1.5, 0.5]
    )
    after_a_round = heard((62.5, "a"), (63.5, "b"))
    assert after_a_round.delays(stamps, 0.0, 100.0) == [0.5, 0.5]


def test_http_adds_to_a_gap_what_its_second_token_is_later_by_than_its_first() -> None:
    late = [[0.5 + 0.001 * (number % 2) for number in range(100)], [0.2] * 100]
    row = Row(1.0, 2, late, Counter(), 0.0, 0.0)
    assert row.added_s == pytest.approx(0.001)


def test_a_stream_of_a_crowd_is_whole_or_says_what_it_lacks() -> None:
    end = b'"finish_reason":"length"} data: [DONE] 0\r\n\r\n'

    def fault(text: str, end: bytes = end, status: int = 200) -> str:
        stream = heard((0.0, text))
        stream.pieces = [(0.0, f"HTTP/1.1 {status} x".encode()), *stream.pieces, (1.0, end)]
        return stream.fault()

    assert fault("789abc") == ""
    assert fault("abd") == "tokens are missing"
    assert fault("abc", b"") == "0 final events, 0 times [DONE]"
    assert fault("abc", status=503).startswith("HTTP/1.1 503")


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []


@pytest.mark.parametrize("command", [soak.main, faults.main, crowd.main], ids=["soak", "faults", "crowd"])
def test_every_command_has_short_help(command: click.Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(command, ["-h"]) == 0
    assert "Show this message and exit" in capsys.readouterr().out
