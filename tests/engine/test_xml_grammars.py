"""Which arguments the grammar of XML calls allows, and that all of them are read as what the schema asks for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import msgspec
import numpy as np
import pytest

from dashinfer_vlm.engine.grammars.calls import CallForm, Calls
from dashinfer_vlm.engine.grammars.compiler import read_vocabulary
from dashinfer_vlm.engine.grammars.forms import compile_for, complaint
from dashinfer_vlm.engine.grammars.trial import Trial
from dashinfer_vlm.frontend.answer_parser import AnswerForm, AnswerParser
from dashinfer_vlm.frontend.pieces import join
from dashinfer_vlm.request import Grammar
from tests.conftest import CheckpointMaker
from tests.tokens import IM_END, VOCAB

TAGS = ("<tool_call>", "</tool_call>")


@pytest.fixture(scope="module")
def vocabulary(checkpoint: CheckpointMaker) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(read_vocabulary(Path(checkpoint("qwen2_vl"))), n_vocab=VOCAB, eos_token=[IM_END])


def of(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def grammar(schema: dict[str, Any], *, free: bool = False, **fields: Any) -> Grammar:
    form = CallForm("\n<function=look>\n", schema, "</function>\n", xml=True)
    return Grammar("calls", msgspec.json.encode(Calls(*TAGS, [form], True, free, [])).decode(), "tools", **fields)


def call(**values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=look>\n{parameters}</function>\n</tool_call>"


def allows(vocabulary: llguidance.LLTokenizer, grammar: Grammar, text: str) -> bool:
    matcher = compile_for(vocabulary, grammar)
    tokens = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


TEXT: dict[str, Any] = {"type": "string"}
LISTED: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
VALUES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        TEXT,
        ["", "sky", "42", "\n a\n\n", "<b>\n</p", "a <parameter=x>!"],
        ["a</parameter>b", "<parameter=x>!", "a\n<parameter=b>\n"],
    ),
    ({}, ["sky", "42"], []),
    ({"type": "integer", "minimum": 3}, ["3"], ["2", "3.5", "sky", '"3"']),
    ({"type": "boolean"}, ["true"], ["True", "yes"]),
    (LISTED, ["[1, 2]", "[]"], ["[true]", "1"]),
    ({"type": "object", "properties": {"a": TEXT}, "required": ["a"]}, ['{"a": "</parameter>"}'], ['{"a": 1}', "{}"]),
    ({"enum": ["red", "light blue"]}, ["red", "light blue"], ["blue", '"red"']),
    ({"const": "red"}, ["red"], ["blue"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "a\n "], ["a", "abcd"]),
    ({"type": "string", "pattern": r"^a/[0-9]{2}$"}, ["a/12"], ["a/1", "b/12", "a/123"]),
    ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
    ({"type": "string", "pattern": r"\$$"}, ["$", "a$"], ["$a"]),
    ({"anyOf": [TEXT, {"type": "null"}], "default": None}, ["null", "sky"], []),
    ({"type": ["string", "integer"]}, ["7", "seven"], []),
    ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, ["null", "a"], ["b"]),
    ({"anyOf": [TEXT, LISTED]}, ["sky", "[1]", "7", "\u00a0[true]"], ['["a"]', " [true]"]),
    ({"$ref": "#/$defs/Box"}, ['{"a": 1}'], ['{"a": "b"}']),
    ({"$ref": "#/$defs/Word"}, ["ab"], ["a"]),
    ({"type": "array", "items": {"$ref": "#"}}, ["[]", '[{"at": [{"at": []}]}]'], ["[[]]", "[{}]", '[{"at": 1}]']),
    ({"$ref": "#/$defs/Deep"}, ["[]", '[{"at": []}]'], ["[[]]", "[{}]"]),
]
DEFS = {"Box": {"type": "object", "properties": {"a": {"$ref": "#/$defs/Number"}}}, "Number": {"type": "integer"}}
DEFS["Word"] = {"type": "string", "minLength": 2}
DEFS["Deep"] = {"type": "array", "items": {"$ref": "#"}}


@pytest.mark.parametrize(("schema", "right", "wrong"), VALUES, ids=[json.dumps(schema) for schema, *_ in VALUES])
def test_a_value_follows_its_schema(
    vocabulary: llguidance.LLTokenizer, schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    whole = of({"at": schema}, "at", **{"$defs": DEFS})
    for text in right:
        assert allows(vocabulary, grammar(whole), call(at=text)), text
        parser = AnswerParser(AnswerForm(names=frozenset({"look"}), schemas={"look": whole}, sure=True))
        (told,) = join([*parser.push(call(at=text)), *parser.flush()]).calls
        jsonschema.validate(json.loads(told.arguments), whole)
    for text in wrong:
        assert not allows(vocabulary, grammar(whole), call(at=text)), text


@pytest.mark.parametrize("target", ["#/properties/a", "#/properties/b/items"])
def test_a_reference_leads_to_another_parameter(vocabulary: llguidance.LLTokenizer, target: str) -> None:
    number = {"type": "integer", "minimum": 3}
    schema = grammar(of({"a": number, "b": {"type": "array", "items": number}, "c": {"$ref": target}}, "c"))
    assert [allows(vocabulary, schema, call(c=text)) for text in ("3", "2", "x")] == [True, False, False]


def test_arguments_may_hold_arguments(vocabulary: llguidance.LLTokenizer) -> None:
    schema = grammar(of({"a": {"$ref": "#"}, "n": {"type": "integer"}}))
    assert [allows(vocabulary, schema, call(a=text)) for text in ('{"a": {"n": 1}}', "{}")] == [True, True]
    assert [allows(vocabulary, schema, call(a=text)) for text in ('{"a": {"n": "1"}}', "[]")] == [False, False]


def test_parameters_are_those_of_the_schema_in_its_order(vocabulary: llguidance.LLTokenizer) -> None:
    schema = grammar(of({"at": TEXT, "n": {"type": "integer"}}, "at"))
    allowed = [{"at": "sky"}, {"at": "sky", "n": "1"}]
    others = [{}, {"n": "1"}, {"n": "1", "at": "sky"}, {"at": "sky", "at2": "b"}, {"at": "sky", "n": "many"}]
    assert [allows(vocabulary, schema, call(**values)) for values in allowed] == [True, True]
    assert [allows(vocabulary, schema, call(**values)) for values in others] == [False] * 5


def test_the_longest_bound_can_be_kept() -> None:
    trial = Trial()
    try:
        longest = {"type": "string", "minLength": 1000, "maxLength": 1000}
        assert trial.problem(grammar(of({f"p{i}": longest for i in range(5)}))) is None
    finally:
        trial.close()


@pytest.mark.parametrize("schema", [{}, {"type": ["object", "null"]}, {"additionalProperties": True, "x-of": 1}])
def test_a_schema_without_properties_allows_any(vocabulary: llguidance.LLTokenizer, schema: dict[str, Any]) -> None:
    for values in ({}, {"a": "1"}, {"a": "1", "b c": "\n"}):
        assert allows(vocabulary, grammar(schema), call(**values)), values
    none, numbers = {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}
    assert [allows(vocabulary, grammar(none), text) for text in (call(), call(a="1"))] == [True, False]
    assert [allows(vocabulary, grammar(numbers), call(a=text)) for text in ("1", "b")] == [True, False]


def test_calls_stand_among_text_where_they_may(vocabulary: llguidance.LLTokenizer) -> None:
    free = grammar(of({"at": TEXT}, "at"), free=True)
    for text in ("", "words <function=look>", call(at="sky"), f"so:\n\n{call(at='a')}\n{call(at='b')}\nthen"):
        assert allows(vocabulary, free, text), text
    assert not allows(vocabulary, free, call())
    thinking = grammar(of({}), thought=("", "</think>"))
    assert allows(vocabulary, thinking, f"so\n</think>\n\n{call()}\n{call()}")
    assert not allows(vocabulary, thinking, "so\n</think>\n\nwords")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string"}, "incompatible types"),
        ({"anyOf": [of({})]}, "arguments: anyOf"),
        (of({"a\n": TEXT}), "name of a parameter"),
        ({"properties": []}, "properties is no object"),
        (of({"at": {"type": "string", "not": {}}}), "at: not"),
        (of({"at": {"anyOf": [TEXT, {"type": "integer", "minimum": 3}]}}), "told apart"),
        (of({"at": {"anyOf": [{"enum": ["1"]}, {"type": "integer"}]}}), "told apart"),
        (of({"at": {"enum": ["a\n</parameter>"]}}), "value of a parameter"),
        (of({"at": {"$ref": "#/$defs/Word", "maxLength": 3}}, **{"$defs": DEFS}), "at: maxLength"),
        (of({"at": {"type": "string", "pattern": "a\\"}}), "cannot be read"),
        (of({"at": {"type": "string", "pattern": "a)|(b"}}), "cannot be read"),
        (of({"at": {"type": "string", "minLength": "1}/"}}), "whole numbers"),
        (of({"at": {"type": "string", "maxLength": 1001}}), "lengths of more than 1000"),
        ({"minProperties": 1}, "arguments: minProperties"),
        (of({"at": {"type": "array", "uniqueItems": True}}), "uniqueItems"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(schema: dict[str, Any], reason: str) -> None:
    trial = Trial()
    try:
        assert reason in (trial.problem(grammar(schema)) or "")
    finally:
        trial.close()


def test_a_reason_shows_no_grammar_that_the_client_did_not_write() -> None:
    trial = Trial()
    try:
        wrong = grammar(of({"at": {"type": "array", "items": {"$ref": "#/properties/no"}}}))
        told = complaint(wrong, trial.problem(wrong) or "")
    finally:
        trial.close()
    assert "/properties/no" in told
    assert "tool0" not in told
    assert "\n" not in told


def test_whatever_is_drawn_is_a_call_that_follows_the_schema(vocabulary: llguidance.LLTokenizer) -> None:
    """Of values that come to an end by themselves: who draws at random never ends a free text."""
    bounded = [schema for schema, *_ in VALUES if schema.keys() & {"minimum", "items", "enum", "const", "maxLength"}]
    nullable = {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}
    schemas = {f"p{i}": schema for i, schema in enumerate([*bounded, nullable, {"type": "boolean"}])}
    whole = of(schemas, "p0", "p2")
    compiled, dice, num_calls = compile_for(vocabulary, grammar(whole)), random.Random(0), 0
    for _ in range(20):
        matcher, tokens = compiled.deep_copy(), []
        while IM_END not in tokens:
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            tokens.append(int(dice.choice(np.flatnonzero(mask))))
            assert matcher.consume_token(tokens[-1])
        parser = AnswerParser(AnswerForm(names=frozenset({"look"}), schemas={"look": whole}, sure=True))
        said = join([*parser.push(vocabulary.decode_str(tokens[:-1])), *parser.flush()])
        num_calls += len(said.calls)
        assert said.text == ""
        for call in said.calls:
            jsonschema.validate(json.loads(call.arguments), whole)
    assert num_calls >= 20
