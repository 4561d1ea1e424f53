"""Structured output through the whole of the offline API, with a model whose weights are random."""

from __future__ import annotations

import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dashinfer_vlm import VLM, GenerationParams, Grammar, SamplingParams
from dashinfer_vlm.errors import UnsupportedError
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.offline.random_schemas import Schema, schemas


def drawn(number: int) -> list[Schema]:
    """So many different random schemas, always the same ones."""
    found: dict[str, Schema] = {}

    @settings(
        max_examples=3 * number,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        schema = data.draw(schemas())
        found.setdefault(json.dumps(schema), schema)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw()
    assert len(found) >= number
    return list(found.values())[:number]


@cache
def closing(folder: str) -> tuple[tuple[int, float], ...]:
    """Tokens that close what is open, and by how much they must be favoured, so that a text of this model ever ends:
    nearly every one of its tokens is a word, and lists and objects would go on growing."""
    tokenizer = Tokenizer.from_folder(Path(folder))
    return tuple((tokenizer.encode_text(text)[0], bias) for text, bias in (('"', 12.0), ("]", 3.0), ("}", 3.0)))


def params(vlm: VLM, schema: Schema, *, temperature: float, seed: int, n: int = 1) -> GenerationParams:
    sampling = SamplingParams(
        grammar=Grammar.json_schema(schema),
        max_tokens=800,
        temperature=temperature,
        seed=seed,
        logit_bias={token: bias * temperature for token, bias in closing(vlm.info.model)},
    )
    return GenerationParams(sampling=sampling, n=n)


def wrong_answers(vlm: VLM, number: int, *, temperature: float, n: int = 1) -> list[str]:
    told = []
    chosen = drawn(number)
    asked = [params(vlm, schema, temperature=temperature, seed=i, n=n) for i, schema in enumerate(chosen)]
    for schema, result in zip(chosen, vlm.generate(["a"] * number, asked), strict=True):
        if result.error is not None:
            told.append(f"{json.dumps(schema)}: {result.error}")
            continue
        assert len(result.answers) == n
        for answer in result.answers:
            try:
                jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
                assert answer.finish_reason == "stop"
            except (ValueError, AssertionError, jsonschema.ValidationError) as error:
                told.append(f"{json.dumps(schema)}: {answer.text[:200]!r}: {str(error)[:200]}")
    return told


def test_answers_to_random_schemas_are_valid(vlm: VLM) -> None:
    assert wrong_answers(vlm, 40, temperature=1.0) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("temperature", "n"), [(1.0, 1), (2.0, 1), (1.0, 4), (2.0, 4)])
def test_answers_to_200_random_schemas_are_valid(vlm: VLM, temperature: float, n: int) -> None:
    assert wrong_answers(vlm, 200, temperature=temperature, n=n) == []


def test_more_schemas_than_a_server_lets_wait_are_compiled_in_turn(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashinfer_vlm.engine.grammars.compiler.MAX_WAITING", 3)
    asked = [SamplingParams(grammar=Grammar.choices([f"word {i}"]), max_tokens=20) for i in range(24)]
    assert [result.text for result in vlm.generate(["a"] * 24, asked)] == [f"word {i}" for i in range(24)]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[a-f]{3}-\d{2}"), r"[a-f]{3}-\d{2}"),
        (Grammar.choices(["red", "green", "blue"]), "red|green|blue"),
        (Grammar("grammar", 'root ::= [0-9] ("," [0-9]){2}'), r"\d,\d,\d"),
    ],
)
def test_every_kind_of_grammar_in_a_conversation(vlm: VLM, grammar: Grammar, pattern: str) -> None:
    asked = GenerationParams(sampling=SamplingParams(grammar=grammar, seed=1, temperature=2.0), n=4)
    result = vlm.chat([{"role": "user", "content": "a"}], asked)
    assert all(re.fullmatch(pattern, answer.text) for answer in result.answers)
    assert {answer.finish_reason for answer in result.answers} == {"stop"}


def test_a_schema_that_is_not_supported_is_refused_and_the_next_one_answered(vlm: VLM) -> None:
    with pytest.raises(UnsupportedError, match='Unimplemented keys: \\["uniqueItems"\\]'):
        vlm.generate("a", SamplingParams(grammar=Grammar.json_schema({"type": "array", "uniqueItems": True})))
    kept: Any = vlm.generate("a", SamplingParams(grammar=Grammar.json_schema({"type": "boolean"})))
    assert json.loads(kept.text) in (True, False)
