"""What `make eval` counts: which answers agree with the reference, and which differ by a tie."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.hub import DEMO_MODEL
from dashinfer_vlm.offline.vlm import VLM
from demo_model.agreement import Row, disagreeing
from demo_model.cases import Case, messages_of, with_media
from demo_model.placements import Asked, MisplacedError, ask, expect_cached_prefixes, expect_elsewhere
from demo_model.reference import Reference, Spoken, Step, bfloat16_spacing
from demo_model.samples import Studio

RED = Spoken(
    "A red cross.",
    (
        Step("A", rival="The", is_tie=False),
        Step("A red", rival="A blue", is_tie=True),
        Step("A red cross", rival="A red star", is_tie=False),
        Step("A red cross.", rival="A red cross", is_tie=False),
        Step("A red cross.", rival="A red cross. And", is_tie=True),
    ),
)


def asked(*answers: str) -> Asked:
    return Asked("a way", list(answers), seconds=1.0, proof="")


def cases(count: int, answer: str = "A red cross.") -> list[Case]:
    return [Case("describe", "shapes", [], [], answer)] * count


@pytest.mark.parametrize(
    ("said", "is_tie"),
    [
        ("A blue cross.", True),
        ("A green cross.", False),  # leaves at the tie, but not by the second best token
        ("A red star.", False),
        ("A red cross", False),  # ended before the full stop
        ("A red cross. And a star.", True),  # went on where the reference ended
        ("A red cross. Or not.", False),
        ("The red cross.", False),
    ],
)
def test_only_the_second_best_token_at_a_tie_is_excused(said: str, is_tie: bool) -> None:
    assert RED.differs_by_a_tie(said) is is_tie


def test_ties_count_as_agreement_and_other_differences_are_shown() -> None:
    row = Row.of(asked("A red cross.", "A blue cross.", "A red star."), cases(3), [RED] * 3)
    assert row.num_ties == 1
    assert row.exact == pytest.approx(1 / 3)
    assert row.agreement == pytest.approx(2 / 3)
    assert row.others == [{"task": "describe", "reference": "A red cross.", "said": "A red star."}]


def test_one_in_two_hundred_may_differ_and_no_more() -> None:
    def row(num_others: int) -> Row:
        answers = ["A red star."] * num_others + ["A red cross."] * (400 - num_others)
        return Row.of(asked(*answers), cases(400), [RED] * 400)

    assert disagreeing([row(2)]) == []
    assert disagreeing([row(2), row(3)]) == ["a way"]


@pytest.mark.parametrize(("value", "spacing"), [(1.0, 2**-7), (1.99, 2**-7), (2.0, 2**-6), (12.0, 2**-4)])
def test_neighbours_of_bfloat16_are_so_far_apart(value: float, spacing: float) -> None:
    assert bfloat16_spacing(value) == spacing


def test_an_item_that_the_engine_encoded_itself_is_noticed() -> None:
    both = EngineStats(num_items_encoded_total=3, num_items_encoded_elsewhere_total=2)
    with pytest.raises(MisplacedError, match="1 of 3 items were encoded in the engine's step"):
        expect_elsewhere(EngineStats(), both)


def test_the_reference_tells_each_step_of_its_answer_and_the_engine_says_the_same() -> None:
    sample = Studio(np.random.default_rng(5), held_out=True).sample("shapes", (84, 84), 4)
    media = [[Image.fromarray(picture)] for picture in sample.pictures]
    asked = [Case(q.task, "shapes", messages_of(sample, q.text), media, q.answer) for q in sample.questions]
    spoken = list(Reference(DEMO_MODEL).answers(asked))
    for each in spoken:
        assert each.steps[-1].text == each.steps[-2].text == each.text  # the last step is its end
        assert all(step.rival != step.text for step in each.steps[:-1])
    with VLM(DEMO_MODEL, dtype="float32", kv_cache_gib=0.05) as vlm:
        found = ask("the engine", vlm, [*asked, *asked], expect_cached_prefixes)
        assert vlm.chat(with_media(asked[0])).text == spoken[0].text
    assert found.answers == [each.text for each in spoken] * 2
