"""What of JSON Schema is kept, keyword by keyword, and what is refused (docs/json_schema.md has the whole suite)."""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance
import pytest

from dashinfer_vlm.engine.grammars.forms import _DEEPEST, compile_for
from dashinfer_vlm.request import Grammar

KEPT: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({}, [None, 1, "a", [1, {"a": 2}]], []),
    ({"type": "integer", "minimum": -3, "maximum": 12}, [-3, 0, 12], [-4, 13, 1.5, "1"]),
    ({"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5}, [5, 100], [0, 4, -5]),
    ({"type": "number", "exclusiveMaximum": 1}, [0.5, -2], [1, 1.5, "a"]),
    ({"type": "string", "minLength": 1, "maxLength": 3}, ["a", "äöü"], ["", "abcd", 1]),
    ({"type": "string", "pattern": "^[A-Z]{2}-\\d+$"}, ["AB-12"], ["ab-12", "AB-", "xAB-12"]),
    ({"type": "string", "pattern": "b"}, ["abc"], ["acd"]),
    ({"type": "string", "format": "date"}, ["2026-11-26"], ["2026-13-26", "today"]),
    ({"enum": ["a", 1, None, [True]]}, ["a", 1, None, [True]], ["b", 2, [False]]),
    ({"const": {"a": 1}}, [{"a": 1}], [{"a": 2}, {}]),
    ({"type": ["string", "null"]}, ["a", None], [1, []]),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None, 1.5]),
    ({"allOf": [{"minimum": 1}, {"type": "integer", "maximum": 3}]}, [1, 3], [0, 4]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        [[1], [1, 2]],
        [[], [1, 2, 3], ["a"]],
    ),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, [[None], []], [[1], [None, 1]]),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]},
        [{"a": 1}, {"a": 1, "b": 2}, {"a": 1, "c": 3}],
        [{}, {"b": 2}, {"a": "1"}],
    ),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, [{}, {"a": 1}], [{"b": 1}]),
    ({"type": "object", "patternProperties": {"^x": {"type": "null"}}}, [{"xa": None}, {"a": 1}], [{"xa": 1}]),
    ({"type": "object", "minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 1}]),
    (
        {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"},
        [[], [[], [[]]]],
        [[1], None],
    ),
]
REFUSED: dict[str, dict[str, Any]] = {
    "not": {"not": {"type": "null"}},
    "uniqueItems": {"uniqueItems": True},
    "contains": {"contains": {"type": "null"}},
    "if": {"if": {"type": "integer"}, "then": {"minimum": 1}},
    "propertyNames": {"propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "unevaluatedItems": {"unevaluatedItems": False},
    "oneOf": {"oneOf": [{"minimum": 1}, {"maximum": 5}]},
    "example.org": {"$ref": "https://example.org/schema"},
    "sentence": {"type": "string", "format": "sentence"},
}


def can_be_written(schema: dict[str, Any], value: Any) -> bool:
    matcher = compile_for(llguidance.LLTokenizer("byte"), Grammar.json_schema(schema))
    data = list(json.dumps(value, ensure_ascii=False).encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@pytest.mark.parametrize(("schema", "valid", "invalid"), KEPT, ids=[json.dumps(case[0]) for case in KEPT])
def test_a_keyword_is_kept(schema: dict[str, Any], valid: list[Any], invalid: list[Any]) -> None:
    assert [value for value in valid if not can_be_written(schema, value)] == []
    assert [value for value in invalid if can_be_written(schema, value)] == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_keyword_that_is_not_kept_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{re.escape(name)}\b"):
        can_be_written(REFUSED[name], None)


@pytest.mark.parametrize("number", [2**53 + 1, -(2**53) - 1, 2**64 + 3])
def test_a_whole_number_that_a_float_does_not_hold_is_refused_where_it_would_be_the_answer(number: int) -> None:
    for schema in ({"const": number}, {"enum": ["a", number]}, {"type": "array", "items": {"const": {"a": [number]}}},
                   {"properties": {"const": {"const": number}}}, {"anyOf": [{"type": "null"}, {"const": number}]},
                   {"$defs": {"enum": {"const": number}}, "$ref": "#/$defs/enum"}):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{number} in (const|enum): "):
            can_be_written(schema, number)
    with pytest.raises(ValueError, match=rf"^{abs(number)} in multipleOf: "):
        can_be_written({"type": "integer", "multipleOf": abs(number)}, 0)


@pytest.mark.parametrize(
    ("bounds", "written", "forbidden"),
    [
        ({"minimum": 2**53 + 1}, [2**53 + 2, 2**53 + 4], [2**53, 2**53 + 1, 5]),
        ({"maximum": 2**53 + 3}, [2**53 + 2, 0, -7], [2**53 + 3, 2**53 + 4]),
        ({"minimum": -(2**53) - 1}, [-(2**53), 3], [-(2**53) - 1, -(2**53) - 2]),
        ({"exclusiveMinimum": 2**53, "exclusiveMaximum": 2**53 + 4}, [2**53 + 2], [2**53, 2**53 + 1, 2**53 + 4]),
        (
            {"minimum": -(2**63), "maximum": 2**63 - 1},
            [1024 - 2**63, 0, 2**63 - 1024],
            [2**63 - 1, 2**63, -(2**63)],
        ),
        ({"maximum": 2**64}, [5, 2**63 - 1024], [2**63, 2**64, 2**64 + 1]),
    ],
)
def test_what_is_written_is_within_large_bounds(
    bounds: dict[str, int], written: list[int], forbidden: list[int]
) -> None:
    """Those that a float does not hold are moved inwards."""
    schema = {"type": "integer", **bounds}
    assert [can_be_written(schema, number) for number in written] == [True] * len(written)
    assert not any(can_be_written(schema, number) for number in forbidden)


@pytest.mark.parametrize("bound", ["5", None, True, [5]])
def test_a_bound_that_is_no_number_is_refused_beside_a_large_one(bound: object) -> None:
    with pytest.raises(ValueError, match="minimum"):
        can_be_written({"type": "integer", "minimum": bound, "maximum": 2**60}, 5)


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 2**53 + 1, "maximum": 2**53 + 1},
        {"exclusiveMinimum": 2**53, "exclusiveMaximum": 2**53 + 2},
        {"minimum": 2**64 + 1, "maximum": 2**64 + 1},
        {"minimum": 2**63},
    ],
)
def test_bounds_that_leave_no_number_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="leave no number that is kept exactly"):
        can_be_written({"type": "integer", **bounds}, 5)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**53},
        {"properties": {"const": {"type": "integer", "maximum": 2**62}}},
        {"default": {"const": 2**60 + 1}},
        {"enum": ["9007199254740993"]},
    ],
)
def test_other_numbers_may_be_large(schema: dict[str, Any]) -> None:
    compile_for(llguidance.LLTokenizer("byte"), Grammar.json_schema(schema))


def test_a_schema_as_deep_as_is_said_is_read() -> None:
    deep: dict[str, Any] = {"type": "null"}
    while json.dumps(deep).count("{") < _DEEPEST:
        deep = {"properties": {"a": deep}} if json.dumps(deep).count("{") < _DEEPEST - 1 else {"anyOf": [deep]}
    compile_for(llguidance.LLTokenizer("byte"), Grammar.json_schema(deep))


def test_blanks_between_parts_are_bounded() -> None:
    matcher = compile_for(llguidance.LLTokenizer("byte"), Grammar.json_schema({"type": "array"}))
    assert matcher.try_consume_tokens(list(b"[" + b" " * 40)) == 1 + 32


def test_a_schema_may_ask_for_no_blanks_at_all() -> None:
    options = {"whitespace_flexible": False, "whitespace_pattern": None}
    schema = Grammar.json_schema({"type": "array", "x-guidance": options})
    matcher = compile_for(llguidance.LLTokenizer("byte"), schema)
    assert matcher.try_consume_tokens(list(b"[1, 2]")) == len("[1,")
