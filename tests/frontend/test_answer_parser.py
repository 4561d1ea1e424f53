"""Answers as models write them, in pieces of every size."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.frontend.answer_parser import PLAIN, AnswerForm, AnswerParser
from dashinfer_vlm.frontend.pieces import CallArguments, CallStart, Piece, Said, TextPiece, join

TOOLS = AnswerForm(names=frozenset({"look", "add"}))
THINKING = AnswerForm(may_think=True, names=TOOLS.names)
OPENED = AnswerForm(begins_in_thought=True, may_think=True)
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": [1, {"b": "}\\"]"}]}}\n</tool_call>'
TRICKY = '<tool_call>\n{"name": "look", "arguments": {"at": "</tool_call> \\\\"}}\n</tool_call>'


def read(text: str, form: AnswerForm, cuts: list[int] | None = None, *, cut: bool = False) -> list[Piece]:
    parser, news = AnswerParser(form), []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    for begin, end in pairwise(edges):
        news += parser.push(text[begin:end])
    return news + parser.flush(cut=cut)


def said(
    text: str, form: AnswerForm, cuts: list[int] | None = None, *, cut: bool = False
) -> tuple[str, str, list[tuple[str, str]]]:
    told: Said = join(read(text, form, cuts, cut=cut))
    return told.reasoning, told.text, [(call.name, call.arguments) for call in told.calls]


CASES = [
    ("hello\n", PLAIN, ("", "hello\n", [])),
    (LOOK, PLAIN, ("", LOOK, [])),
    (LOOK, TOOLS, ("", "", [("look", '{"at": "sky"}')])),
    (
        f"I look.\n{LOOK}\n{ADD}\n",
        TOOLS,
        ("", "I look.", [("look", '{"at": "sky"}'), ("add", '{"a": [1, {"b": "}\\"]"}]}')]),
    ),
    (TRICKY, TOOLS, ("", "", [("look", '{"at": "</tool_call> \\\\"}')])),
    (LOOK.removesuffix("\n</tool_call>"), TOOLS, ("", "", [("look", '{"at": "sky"}')])),
    ('<tool_call>{"name":"look"}</tool_call>', TOOLS, ("", "", [("look", "{}")])),
    ('<tool_call>{"arguments": {}, "name": "add"}</tool_call>', TOOLS, ("", "", [("add", "{}")])),
    ("a < b\n\n", TOOLS, ("", "a < b\n\n", [])),
    ("<think>\nhm\n\nso\n</think>\n\nyes\n", THINKING, ("hm\n\nso", "yes\n", [])),
    (f"<think>hm</think>{LOOK}", THINKING, ("hm", "", [("look", '{"at": "sky"}')])),
    ("\n<thin", THINKING, ("", "\n<thin", [])),
    ("a <think>b</think>", THINKING, ("", "a <think>b</think>", [])),
    ("hm\n</think>\n\nyes", OPENED, ("hm", "yes", [])),
    ("\nhm </thi", OPENED, ("hm </thi", "", [])),
    (f"{LOOK}\n</think>yes", OPENED, (LOOK, "yes", [])),
]
MALFORMED = [
    '<tool_call>\n{"name": "look", "arguments": {"at": }}\n</tool_call>',
    '<tool_call>\n{"name": "look", "arguments": {}}}\n</tool_call>',
    '<tool_call>\n{"name": "look", "arguments": "sky"}\n</tool_call>',
    '<tool_call>\n{"name": "look", "arguments": {"at": "sk',
    '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"arguments": {}}\n</tool_call>',
    "<tool_call>look(sky)</tool_call>",
    "a\n<tool_call>",
    "\n<tool_call>\n\n",
]


@pytest.mark.parametrize(("text", "form", "expected"), CASES)
def test_an_answer_is_read(text: str, form: AnswerForm, expected: object) -> None:
    assert said(text, form) == expected


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("before", ["", "well,\n"])
def test_what_is_no_call_stays_text(text: str, before: str) -> None:
    assert said(before + text, TOOLS) == ("", before + text, [])


def test_a_call_that_is_nested_too_deeply_stays_text() -> None:
    deep = LOOK.replace('"sky"', "[" * 10_000 + "]" * 10_000)
    assert said(deep, TOOLS) == ("", deep, [])


@pytest.mark.parametrize("num_chars", range(len(LOOK)))
@pytest.mark.parametrize("sure", [False, True])
def test_no_markup_of_a_call_that_was_cut_is_text(num_chars: int, sure: bool) -> None:
    form = AnswerForm(names=TOOLS.names, sure=sure)
    _, text, calls = said("well, 1 > 0\n" + LOOK[:num_chars], form, cut=True)
    assert text.rstrip("\n") == "well, 1 > 0"
    arguments = LOOK[LOOK.index('{"at') : min(num_chars, LOOK.index("}}") + 1)]
    assert calls == ([("look", arguments)] if arguments else [])


def test_a_call_that_was_cut_is_known_as_one() -> None:
    cut, whole = AnswerParser(TOOLS), AnswerParser(TOOLS)
    cut.push(LOOK[:-20])
    whole.push(LOOK)
    cut.flush(cut=True)
    whole.flush(cut=True)
    assert (cut.ends_in_call, whole.ends_in_call) == (True, False)


def test_a_call_behind_one_that_is_none_is_found() -> None:
    _, text, calls = said(MALFORMED[0] + "\n" + LOOK, TOOLS)
    assert (text, calls) == (MALFORMED[0], [("look", '{"at": "sky"}')])


fragments = st.sampled_from(
    [
        LOOK,
        ADD,
        TRICKY,
        *MALFORMED,
        "<think>",
        "</think>",
        "\n",
        "\n\n",
        "word",
        "<",
        "<tool",
        "</tool_call>",
        '{"',
        " ",
    ]
)
forms = st.builds(
    AnswerForm,
    may_think=st.booleans(),
    begins_in_thought=st.booleans(),
    names=st.sampled_from([frozenset(), frozenset({"look"}), TOOLS.names]),
    parallel=st.booleans(),
    sure=st.booleans(),
)


@given(
    parts=st.lists(fragments, max_size=6),
    form=forms,
    cuts=st.lists(st.integers(0, 999), max_size=12),
    cut=st.booleans(),
)
def test_every_way_of_cutting_reads_the_same(parts: list[str], form: AnswerForm, cuts: list[int], cut: bool) -> None:
    text = "".join(parts)
    assert said(text, form, cuts, cut=cut) == said(text, form, cut=cut)
    assert said(text, form, list(range(len(text))), cut=cut) == said(text, form, cut=cut)


@given(parts=st.lists(fragments, max_size=6), cuts=st.lists(st.integers(0, 999), max_size=12))
def test_calls_hold_what_may_be_called_with_objects(parts: list[str], cuts: list[int]) -> None:
    told = join(read("".join(parts), TOOLS, cuts))
    assert all(call.name in TOOLS.names and isinstance(json.loads(call.arguments), dict) for call in told.calls)
    ids = [call.id for call in told.calls]
    assert len(set(ids)) == len(ids)


def test_only_what_may_be_a_call_is_held_back() -> None:
    parser = AnswerParser(TOOLS)
    told = [join(parser.push(text)).text for text in ["a\n", "b <", "c <tool", "_box>\n", "d"]]
    assert told == ["a", "\nb ", "<c ", "<tool_box>", "\nd"]


def test_arguments_that_a_grammar_vouches_for_are_told_as_they_come() -> None:
    parser = AnswerParser(AnswerForm(names=TOOLS.names, sure=True))
    pieces = [LOOK[:20], LOOK[20:45], LOOK[45:50], LOOK[50:]]
    told = [parser.push(text) for text in pieces]
    assert told[0] == []
    assert [type(piece) for piece in told[1]] == [CallStart, CallArguments]
    arguments = [p.text for news in told for p in news if isinstance(p, CallArguments)]
    assert arguments == ['{"a', 't": "', 'sky"}']


def test_one_call_is_the_end_where_calls_are_not_parallel() -> None:
    parser = AnswerParser(AnswerForm(names=TOOLS.names, parallel=False))
    told = join(parser.push(f"so\n{LOOK}\n{ADD} more"))
    assert (told.text, [call.name for call in told.calls]) == ("so", ["look"])
    assert parser.is_over
    assert parser.flush() == []


def test_reasoning_is_known_while_it_comes() -> None:
    parser = AnswerParser(THINKING)
    states = []
    for text in ["<think>", "hm", "</think>", "yes"]:
        news = parser.push(text)
        states.append(parser.in_thought)
    assert states == [True, True, False, False]
    assert news == [TextPiece("yes")]
