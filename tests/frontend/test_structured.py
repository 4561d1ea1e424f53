"""Every name under which clients say what form an answer has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.schema import explain
from dashinfer_vlm.frontend.structured import StructuredBody
from dashinfer_vlm.request import Grammar

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))


def grammar(**fields: Any) -> Grammar | None:
    try:
        return StructuredBody.model_validate(fields).grammar()
    except ValidationError as error:
        raise explain(error) from error


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None}, None),
        (
            {"response_format": {"type": "json_object"}},
            Grammar("json_schema", '{"type":"object"}', "response_format"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            Grammar("json_schema", TEXT, "response_format"),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
                }
            },
            Grammar("json_schema", TEXT, "response_format"),
        ),
        ({"guided_json": SCHEMA}, Grammar("json_schema", TEXT, "guided_json")),
        ({"guided_json": " {} "}, Grammar("json_schema", " {} ", "guided_json")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a","b"]', "guided_choice")),
        ({"guided_grammar": "start: x"}, Grammar("grammar", "start: x", "guided_grammar")),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"json": TEXT}}, Grammar("json_schema", TEXT, "structured_outputs.json")),
        (
            {"structured_outputs": {"json_object": True}},
            Grammar("json_schema", '{"type":"object"}', "structured_outputs.json_object"),
        ),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Grammar("regex", "a+", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["é"]}}, Grammar("choice", '["é"]', "structured_outputs.choice")),
        (
            {"structured_outputs": {"grammar": "x", "disable_any_whitespace": False}},
            Grammar("grammar", "x", "structured_outputs.grammar"),
        ),
    ],
)
def test_every_name_means_the_same_grammar(fields: dict[str, Any], expected: Grammar | None) -> None:
    assert grammar(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"guided_json": 5}, "guided_json", "number"),
        ({"guided_choice": "a"}, "guided_choice", "list"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format", "schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}},
            "response_format",
            "if and only if",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of json"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "one of json"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "not supported",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.choice",
            "structured_outputs.regex and structured_outputs.choice",
        ),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "response_format and"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told) as refusal:
        grammar(**fields)
    assert refusal.value.param == param
