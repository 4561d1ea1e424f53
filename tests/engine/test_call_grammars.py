"""Which texts the grammars of calls and of reasoning allow, with tags that are tokens and tags that are text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llguidance
import msgspec
import pytest

from dashinfer_vlm.engine.grammars.calls import CallForm, Calls
from dashinfer_vlm.engine.grammars.compiler import read_vocabulary
from dashinfer_vlm.engine.grammars.forms import compile_for
from dashinfer_vlm.engine.grammars.trial import Trial
from dashinfer_vlm.request import Grammar
from tests.conftest import CheckpointMaker
from tests.tokens import IM_END, VOCAB

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TEXT_TAGS = ("<tool_call>", "</tool_call>")
TOKEN_TAGS = ("<|quad_start|>", "<|quad_end|>")
"""Tokens of the test's vocabulary in the place of a model's own tags."""
WEATHER = '{0}\n{{"name": "weather", "arguments": {{"city": "Paris"}}}}\n{1}'
TIME = '{0}\n{{"name": "time", "arguments": {{}}}}\n{1}'


@pytest.fixture(scope="module")
def vocabulary(checkpoint: CheckpointMaker) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(read_vocabulary(Path(checkpoint("qwen2_vl"))), n_vocab=VOCAB, eos_token=[IM_END])


def grammar(
    tags: tuple[str, str], *, parallel: bool = True, free: bool = False, content: Grammar | None = None, **fields: Any
) -> Grammar:
    forms = [
        CallForm(f'\n{{"name": "{name}", "arguments": ', schema, "}\n")
        for name, schema in (("weather", CITY), ("time", {}))
    ]
    calls = Calls(*tags, forms, parallel, free, ["<|box_start|>", "<|box_end|>"], content)
    return Grammar("calls", msgspec.json.encode(calls).decode(), "tools", **fields)


def allows(vocabulary: llguidance.LLTokenizer, grammar: Grammar, text: str) -> bool:
    """Whether `text`, in which special tokens are meant, may be a whole answer."""
    matcher = compile_for(vocabulary, grammar)
    tokens = vocabulary.tokenize_str(text, parse_special=True)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("tags", [TEXT_TAGS, TOKEN_TAGS])
def test_calls_that_must_be_are_calls_and_nothing_else(
    vocabulary: llguidance.LLTokenizer, tags: tuple[str, str]
) -> None:
    weather, time = WEATHER.format(*tags), TIME.format(*tags)
    must, one = grammar(tags), grammar(tags, parallel=False)
    assert [allows(vocabulary, must, text) for text in (weather, f"{weather}\n{time}")] == [True, True]
    assert [allows(vocabulary, one, text) for text in (time, f"{weather}\n{time}")] == [True, False]
    for wrong in (
        "",
        f"hm {weather}",
        weather.replace("weather", "fly"),
        weather.replace('"Paris"', "3"),
        weather[:-9],
    ):
        assert not allows(vocabulary, must, wrong), wrong


@pytest.mark.parametrize("tags", [TEXT_TAGS, TOKEN_TAGS])
def test_free_answers_are_text_with_well_formed_calls(
    vocabulary: llguidance.LLTokenizer, tags: tuple[str, str]
) -> None:
    weather, free = WEATHER.format(*tags), grammar(tags, free=True)
    for text in ("", "no <tool at all\n", weather, f"so:\n{weather}\n{TIME.format(*tags)}\nthen"):
        assert allows(vocabulary, free, text), text
    assert not allows(vocabulary, free, weather.replace('"Paris"', "3"))
    assert not allows(vocabulary, grammar(tags, free=True, parallel=False), f"{weather}{weather}")


def test_marks_of_places_may_stand_in_free_text(vocabulary: llguidance.LLTokenizer) -> None:
    text = "there <|box_start|>(1,2)<|box_end|> it is\n" + WEATHER.format(*TOKEN_TAGS)
    assert allows(vocabulary, grammar(TOKEN_TAGS, free=True), text)
    assert not allows(vocabulary, grammar(TOKEN_TAGS, free=True), "<|im_start|>")


@pytest.mark.parametrize("tags", [("<think>", "</think>"), TOKEN_TAGS])
@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (grammar(TEXT_TAGS), WEATHER.format(*TEXT_TAGS)),
        (Grammar.json_schema(CITY), '{"city": "Paris"}'),
        (Grammar("regex", "a+"), "aa"),
        (Grammar.choices(["yes", "no"]), "no"),
        (Grammar("grammar", 'root ::= "x" [0-9]'), "x1"),
    ],
)
def test_reasoning_is_free_and_the_form_follows(
    vocabulary: llguidance.LLTokenizer, tags: tuple[str, str], form: Grammar, answer: str
) -> None:
    begin, end = tags
    opened = msgspec.structs.replace(form, thought=("", end))
    possible = msgspec.structs.replace(form, thought=(begin, end))
    thought = f"so {{it}}\nis{end}\n\n"
    assert allows(vocabulary, opened, thought + answer)
    assert [allows(vocabulary, possible, text) for text in (begin + thought + answer, answer)] == [True, True]
    assert [allows(vocabulary, opened, text) for text in (answer, thought, thought + "!")] == [False] * 3


@pytest.mark.parametrize("tags", [TEXT_TAGS, TOKEN_TAGS])
@pytest.mark.parametrize("thought", [None, ("", "</think>")])
@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (Grammar.json_schema(CITY), '{"city": "Paris"}'),
        (Grammar("regex", "a+"), "aa"),
        (Grammar.choices(["yes", "no"]), "no"),
        (Grammar("grammar", 'start: "x" /[0-9]/'), "x1"),
    ],
)
def test_an_answer_has_its_form_or_is_calls_alone(
    vocabulary: llguidance.LLTokenizer,
    tags: tuple[str, str],
    thought: tuple[str, str] | None,
    content: Grammar,
    answer: str,
) -> None:
    begin = "" if thought is None else "so\n</think>\n\n"
    weather, either = WEATHER.format(*tags), grammar(tags, content=content, thought=thought)
    for right in (answer, weather, f"{weather}\n{TIME.format(*tags)}"):
        assert allows(vocabulary, either, begin + right), right
    for wrong in ("", "words", f"{answer}\n{weather}", f"{weather}\n{answer}", weather.replace('"Paris"', "3")):
        assert not allows(vocabulary, either, begin + wrong), wrong


@pytest.mark.parametrize("free", [False, True])
def test_they_are_tried_before_they_are_used(free: bool) -> None:
    trial = Trial()
    try:
        assert trial.problem(grammar(TOKEN_TAGS, free=free, thought=("", "</think>"))) is None
        unknown = CallForm("a", {"uniqueItems": True, "type": "array"}, "b")
        text = msgspec.json.encode(Calls(*TEXT_TAGS, [unknown], True, free, [])).decode()
        assert "uniqueItems" in (trial.problem(Grammar("calls", text)) or "")
        rounded = CallForm("a", {"properties": {"id": {"enum": [2**53 + 1]}}}, "b")
        text = msgspec.json.encode(Calls(*TEXT_TAGS, [rounded], True, free, [])).decode()
        assert "9007199254740993 in enum" in (trial.problem(Grammar("calls", text)) or "")
    finally:
        trial.close()
