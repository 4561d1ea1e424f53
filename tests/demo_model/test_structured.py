"""A form takes nothing from what the demo model knows: its answers are right in a form where they are right without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm import VLM, Grammar, SamplingParams
from demo_model.scenes import COLOURS, SHAPES, random_shapes, render

NUM_PICTURES = 200
MIN_SHARE = 0.9
SHAPE_AND_COLOUR = {
    "type": "object",
    "properties": {"shape": {"enum": list(SHAPES)}, "colour": {"enum": list(COLOURS)}},
    "required": ["shape", "colour"],
    "additionalProperties": False,
}
SENTENCE = rf"An? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\."

pytestmark = pytest.mark.slow


def pictures() -> Iterator[tuple[Image.Image, str]]:
    """Each with one shape, and the sentence that tells it."""
    for seed in range(NUM_PICTURES):
        rng = np.random.default_rng((777, seed))
        scene = random_shapes(rng, 224, 224, 1, 0.3)
        thing = scene.things[0]
        article = "An" if thing.colour == "orange" else "A"
        yield Image.fromarray(render(rng, scene, 0.3)), f"{article} {thing.colour} {thing.kind}."


@pytest.fixture(scope="module")
def vlm() -> Iterator[VLM]:
    with VLM(progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def shown() -> list[tuple[Image.Image, str]]:
    return list(pictures())


def told(
    vlm: VLM, shown: list[tuple[Image.Image, str]], grammar: Grammar | None, question: str = "Describe this image."
) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=40, grammar=grammar)
    questions: list[Any] = [[{"role": "user", "content": [picture, question]}] for picture, _ in shown]
    return [result.text for result in vlm.chat(questions, params)]


@pytest.fixture(scope="module")
def right(vlm: VLM, shown: list[tuple[Image.Image, str]]) -> list[bool]:
    return [answer == true for answer, (_, true) in zip(told(vlm, shown, None), shown, strict=True)]


@pytest.mark.parametrize(
    ("grammar", "written"),
    [
        (Grammar("regex", SENTENCE), str),
        (Grammar.choices(f"{'An' if c == 'orange' else 'A'} {c} {s}." for c in COLOURS for s in SHAPES), str),
        (Grammar.json_schema({"type": "string", "pattern": f"^{SENTENCE}$"}), json.dumps),
    ],
    ids=["regex", "choice", "json"],
)
def test_answers_in_a_form_are_right_where_plain_ones_are(
    vlm: VLM, shown: list[tuple[Image.Image, str]], right: list[bool], grammar: Grammar, written: Any
) -> None:
    answers = told(vlm, shown, grammar)
    kept = sum(ok and answer == written(true) for ok, answer, (_, true) in zip(right, answers, shown, strict=True))
    assert sum(right) >= MIN_SHARE * NUM_PICTURES
    assert kept >= MIN_SHARE * sum(right), f"{kept} of {sum(right)}"


@pytest.mark.parametrize(
    "grammar",
    [Grammar.json_schema(SHAPE_AND_COLOUR), Grammar.json_object(), None],
    ids=["schema", "object", "unforced"],
)
def test_answers_as_json_are_right_where_sentences_are(
    vlm: VLM, shown: list[tuple[Image.Image, str]], right: list[bool], grammar: Grammar | None
) -> None:
    """The question is one that was held out in training."""
    answers = told(vlm, shown, grammar, "Describe this image as JSON.")
    wanted = [dict(zip(("colour", "shape"), true[:-1].split()[1:], strict=True)) for _, true in shown]
    kept = sum(ok and json.loads(answer) == want for ok, answer, want in zip(right, answers, wanted, strict=True))
    assert kept >= MIN_SHARE * sum(right), f"{kept} of {sum(right)}"
