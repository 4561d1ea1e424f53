"""A timed stream of bytes becomes exact figures, or the reason why it is no answer."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.bench.events import Piece, StreamError, read_events, read_reply
from tests.bench.stand_in import Script, events

DONE = b"data: [DONE]\n\n"


def encode(*chunks: object) -> list[bytes]:
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]


def answer(num_tokens: int, tokens_per_event: int = 1) -> list[bytes]:
    return [*encode(*events(Script(tokens_per_event=tokens_per_event), num_tokens)), DONE]


def timed(pieces: list[bytes]) -> list[Piece]:
    """The n-th piece arrives in second n, counted from 1."""
    return [(float(i), piece) for i, piece in enumerate(pieces, 1)]


def test_times_count_events_with_text_and_tokens_count_as_the_server_says() -> None:
    reply = read_reply(0.0, 9.0, timed(answer(6, tokens_per_event=2)), 6)  # role in second 1, text in 2, 3 and 4

    assert reply.first_token_s == 2.0
    assert reply.gaps_s == (1.0, 1.0)
    assert reply.per_token_s == pytest.approx(2.0 / 5)
    assert reply.tokens_per_event == 2.0
    assert (reply.num_output_tokens, reply.num_prompt_tokens) == (6, 7)


def test_events_that_arrive_in_one_piece_share_its_time() -> None:
    reply = read_reply(1.0, 9.0, [(3.0, b"".join(answer(4)))], 4)

    assert reply.text_times_s == (3.0,) * 4
    assert (reply.first_token_s, reply.per_token_s, reply.gaps_s) == (2.0, 0.0, (0.0,) * 3)


@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_pieces_may_be_cut_anywhere_and_lines_end_in_three_ways(cuts: list[int], end: bytes) -> None:
    stream = b": a comment\n\nevent: x\ndata: one\ndata:two\n\ndata: \xc3\xa9\n\nid: 4\n\n".replace(b"\n", end) + b":\n"
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [(0.0, stream[a:b]) for a, b in pairwise(edges)]

    assert [data for _, data in read_events(pieces)] == ["one\ntwo", "é"]


def test_an_event_arrives_with_its_last_byte() -> None:
    assert list(read_events([(1.0, b"data: a"), (2.0, b"b\n"), (3.0, b"\n")])) == [(3.0, "ab")]


def test_tokens_that_show_no_text_count_by_their_events() -> None:
    """A model of random weights writes special tokens and parts of characters; the role is no token, nor is the end."""
    role, *_ = events(Script(), 2)
    silent = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": None}]}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    reply = read_reply(0.0, 9.0, timed([*encode(role, silent, silent, end, usage), DONE]), 2)
    assert (reply.first_token_s, reply.gaps_s) == (2.0, (1.0,))


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert read_reply(0.0, 9.0, timed(answer(1)), 1).per_token_s == 0.0


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        (answer(4)[:-1], "without \\[DONE\\]"),
        (answer(3), "3 tokens came where 4 were asked for"),
        ([*encode(*list(events(Script(), 4))[:-1]), DONE], "sent no usage"),
        ([*encode({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 4}}), DONE], "any text"),
        ([*answer(4)[:3], *encode({"error": {"message": "out of memory"}})], "out of memory"),
        ([b"data: {oops\n\n"], "not JSON: {oops"),
        ([b"data: 5\n\n"], "not an object"),
    ],
)
def test_a_stream_that_is_no_whole_answer_says_why(pieces: list[bytes], reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        read_reply(0.0, 9.0, timed(pieces), 4)
