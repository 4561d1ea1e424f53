"""Calls as Qwen3.5 writes them, in pieces of every size: the types of their arguments, and what is no call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.frontend.answer_parser import AnswerForm, AnswerParser
from dashinfer_vlm.frontend.pieces import CallArguments, CallStart
from tests.frontend.test_answer_parser import read, said

PROPERTIES: dict[str, Any] = {
    "at": {"type": "string"},
    "n": {"type": "integer"},
    "x": {"type": "number"},
    "on": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "box": {"$ref": "#/$defs/Box"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "either": {"type": ["string", "integer"]},
    "one": {"enum": ["1", "b"]},
    "any": {},
}
SCHEMA: dict[str, Any] = {"type": "object", "properties": PROPERTIES, "$defs": {"Box": {"properties": {"a": {}}}}}
TOOLS = AnswerForm(names=frozenset({"look", "add"}), schemas={"look": SCHEMA, "add": {}})
THINKING = AnswerForm(may_think=True, begins_in_thought=True, names=TOOLS.names, schemas=TOOLS.schemas)


def call(name: str = "look", /, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


LOOK = call(at="the sky", n="3")
CASES = [
    (LOOK, [("look", '{"at": "the sky", "n": 3}')]),
    (call("add"), [("add", "{}")]),
    (f"{LOOK}\n{call('add', a='1')}\n", [("look", '{"at": "the sky", "n": 3}'), ("add", '{"a": "1"}')]),
    ("<tool_call><function=look><parameter=at>sky</parameter></function></tool_call>", [("look", '{"at": "sky"}')]),
    (
        '<tool_call><function=look><parameter=tags>["</parameter>"]</parameter></function></tool_call>',
        [("look", '{"tags": ["</parameter>"]}')],
    ),
    (LOOK.removesuffix("\n</tool_call>"), [("look", '{"at": "the sky", "n": 3}')]),
]
NO_CALLS = {
    "never closed": LOOK.removesuffix("</function>\n</tool_call>"),
    "a value never closed": LOOK[:50],
    "an unknown function": call("fly", at="sky"),
    "no end of the function": LOOK.replace("</function>\n", ""),
    "a parameter not closed before another one": LOOK.replace("</parameter>\n", "", 1),
    "the last parameter not closed": call(at="sky").replace("</parameter>\n", ""),
    "words among parameters": LOOK.replace("<parameter=n>", "and <parameter=n>"),
    "words behind the function": LOOK.replace("</tool_call>", "so </tool_call>"),
    "no function": "<tool_call>\n<parameter=at>\nsky\n</parameter>\n</tool_call>",
    "no name": LOOK.replace("look", ""),
    "JSON": '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
    "the tag alone": "<tool_call>",
}


@pytest.mark.parametrize(("text", "calls"), CASES)
def test_calls_are_read(text: str, calls: object) -> None:
    assert said(text, TOOLS) == ("", "", calls)
    assert said(f"I look.\n\n{text}", TOOLS) == ("", "I look.", calls)
    assert said(f"hm\n</think>\n\n{text}", THINKING) == ("hm", "", calls)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("at", "42", "42"),
        ("at", "null", "null"),
        ("at", "", ""),
        ("at", "\n  if x:\n\ty \n", "\n  if x:\n\ty \n"),
        ("at", 'a "quoted" \\n <b> & \u00e9', 'a "quoted" \\n <b> & \u00e9'),
        ("at", "x < y </param <parameter=inline> </tool_call>", "x < y </param <parameter=inline> </tool_call>"),
        ("n", "42", 42),
        ("n", "4.5", "4.5"),
        ("n", "many", "many"),
        ("n", "true", "true"),
        ("x", " 4.5 ", 4.5),
        ("x", "NaN", "NaN"),
        ("on", "true", True),
        ("on", "False", False),
        ("on", "1", "1"),
        ("tags", '["a",\n "b"]', ["a", "b"]),
        ("tags", '["</parameter>"]', ["</parameter>"]),
        ("tags", '["a', '["a'),
        ("tags", '{"a": 1}', '{"a": 1}'),
        ("tags", "[" * 10_000, "[" * 10_000),
        ("box", '{"a": [null]}', {"a": [None]}),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "7", "7"),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("one", "1", "1"),
        ("any", "1", "1"),
        ("unknown", "1", "1"),
    ],
)
def test_the_schema_says_what_a_value_is(key: str, text: str, value: object) -> None:
    ((_, arguments),) = said(call(**{key: text}), TOOLS)[2]
    assert json.loads(arguments) == {key: value}
    assert type(json.loads(arguments)[key]) is type(value)


@pytest.mark.parametrize("text", NO_CALLS.values(), ids=NO_CALLS)
@pytest.mark.parametrize("before", ["", "well,\n"])
def test_what_is_no_call_stays_text(text: str, before: str) -> None:
    assert said(before + text, TOOLS) == ("", before + text, [])
    assert said(f"{before}{text}\n{call('add')}", TOOLS)[2] == [("add", "{}")], "the next one is found"


@pytest.mark.parametrize("num_chars", range(len(LOOK)))
@pytest.mark.parametrize("sure", [False, True])
def test_no_markup_of_a_call_that_was_cut_is_text(num_chars: int, sure: bool) -> None:
    form = AnswerForm(names=TOOLS.names, schemas=TOOLS.schemas, sure=sure)
    _, text, calls = said("well, 1 > 0\n" + LOOK[:num_chars], form, cut=True)
    assert text.rstrip("\n") == "well, 1 > 0"
    assert bool(calls) == (num_chars >= LOOK.index("=look>") + 6)
    assert all(name == "look" and '{"at": "the sky", "n": 3}'.startswith(arguments) for name, arguments in calls)


fragments = st.sampled_from(
    [
        LOOK,
        *NO_CALLS.values(),
        call(at="\n\n", on="True", any="<"),
        call(tags='["</parameter>"]'),
        "<parameter=tags>[",
        "</think>",
        "\n",
        "word",
        "<tool_call>\n<function=",
        "<function=add>",
        "<parameter=at>",
        "</parameter>",
        "</function>",
        "</tool_call>",
        '"\\',
        " ",
    ]
)
forms = st.builds(
    AnswerForm,
    may_think=st.booleans(),
    begins_in_thought=st.booleans(),
    names=st.sampled_from([frozenset({"look"}), TOOLS.names]),
    schemas=st.just(TOOLS.schemas),
    parallel=st.booleans(),
    sure=st.booleans(),
)


@given(
    parts=st.lists(fragments, max_size=8),
    form=forms,
    cuts=st.lists(st.integers(0, 999), max_size=12),
    cut=st.booleans(),
)
def test_every_way_of_cutting_reads_the_same(parts: list[str], form: AnswerForm, cuts: list[int], cut: bool) -> None:
    text = "".join(parts)
    assert said(text, form, cuts, cut=cut) == said(text, form, cut=cut)
    assert said(text, form, list(range(len(text))), cut=cut) == said(text, form, cut=cut)


@given(values=st.dictionaries(st.sampled_from(["at", "a", "b c"]), st.text(alphabet='a<>/\n" \\=\u00e9')))
def test_texts_come_back_as_the_template_wrote_them(values: dict[str, str]) -> None:
    text = call("look", **values)
    ((_, arguments),) = said(text, TOOLS, list(range(len(text))))[2]
    assert json.loads(arguments) == values


def test_a_grammar_lets_arguments_be_told_as_they_come() -> None:
    parser = AnswerParser(AnswerForm(names=TOOLS.names, schemas=TOOLS.schemas, sure=True))
    pieces = [
        "<tool_call>\n<function=",
        "look>\n<para",
        "meter=at>\nthe ",
        "sky\n</para",
        "meter>\n<parameter=tags>\n[",
    ]
    news = [parser.push(text) for text in [*pieces, '"a"]\n</parameter>\n', "</function>\n</tool_call>"]]
    assert [type(piece) for piece in news[1]] == [CallStart, CallArguments]
    arguments = [[piece.text for piece in told if isinstance(piece, CallArguments)] for told in news]
    assert arguments == [[], ["{"], ['"at": "the '], ["sky"], ['", "tags": '], ['["a"]'], ["}"]]


def test_without_one_a_call_is_told_when_it_is_whole() -> None:
    parser = AnswerParser(TOOLS)
    assert parser.push(LOOK.removesuffix("l>")) == []
    assert [type(piece) for piece in parser.push("l>")] == [CallStart, CallArguments]


def test_ids_are_of_a_call_alone() -> None:
    ids = [piece.id for piece in read(LOOK * 3, TOOLS) if isinstance(piece, CallStart)]
    assert len(set(ids)) == len(ids) == 3
