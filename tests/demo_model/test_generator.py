"""The generator of pictures and questions, and the tensors that training reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jinja2 import Template
from tokenizers import Tokenizer

from demo_model.batches import NO_TARGET, build, draw_batch
from demo_model.cases import messages_of
from demo_model.export import CHAT_TEMPLATE
from demo_model.questions import PHRASINGS, Asker
from demo_model.samples import Studio
from demo_model.scenes import Scene, Thing, cell_labels, render
from demo_model.vocabulary import SIZE, train_tokenizer

PICTURE_KINDS = ("shapes", "pair", "history", "frames", "video")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def red_square() -> Scene:
    return Scene(84, 84, (Thing("square", "red", 14.0, 70.0, 26.0),))


def test_a_picture_shows_its_thing_where_the_scene_says() -> None:
    picture = render(np.random.default_rng(0), red_square(), 0.0)
    red, green, blue = picture[70, 14].tolist()
    assert red > 180
    assert max(green, blue) < 70
    assert red_square().place(red_square().things[0]) == "bottom left"


def test_cell_labels_hold_the_thing_in_its_patches_alone() -> None:
    labels = cell_labels(red_square())
    assert np.argwhere(labels.kind > 0).tolist() == [[4, 0], [4, 1], [5, 0], [5, 1]]
    assert np.argwhere(labels.centre[..., 0] > 0).tolist() == [[2, 0]]


def test_no_phrasing_is_both_trained_and_held_out() -> None:
    assert all(not set(trained) & set(held_out) for trained, held_out in PHRASINGS.values())


def test_every_question_has_one_right_answer() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        scene = Studio(rng, held_out=False).sample("shapes", (84, 84), 6).scenes[0]
        question = Asker(rng, held_out=False).where(scene)
        if question is None:
            continue
        named = [thing for thing in scene.things if thing.kind in question.text]
        fitting = [thing for thing in named if thing.colour in question.text] or named
        assert len(fitting) == 1
        assert scene.place(fitting[0]).capitalize() + "." == question.answer


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_training_reads_the_very_tokens_of_the_chat_template(kind: str, tokenizer: Tokenizer) -> None:
    sample = Studio(np.random.default_rng(5), held_out=True).sample(kind, (84, 84), 6)
    batch = build([sample], kind, tokenizer)
    for segment, question in enumerate(sample.questions, 1):
        prompt = Template(CHAT_TEMPLATE).render(messages=messages_of(sample, question.text), add_generation_prompt=True)
        for pad, count in (("<|image_pad|>", 9), ("<|video_pad|>", 18)):
            prompt = prompt.replace(pad, pad * count)
        row = (batch.segments[0] == 0) | (batch.segments[0] == segment)
        expected = tokenizer.encode(prompt + question.answer + "<|im_end|>").ids
        assert batch.ids[0][row].tolist() == expected


def test_questions_of_one_picture_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    batch = draw_batch(np.random.default_rng(1), "shapes", tokenizer, 2, 1.0, 4, held_out=False)
    allowed = batch.mask()[0, 0]
    second = (batch.segments[0] == 2).nonzero()[:, 0]
    seen = batch.segments[0][allowed[second[-1]]]
    assert set(seen.tolist()) == {0, 2}


def test_only_answers_are_learned(tokenizer: Tokenizer) -> None:
    sample = Studio(np.random.default_rng(2), held_out=False).sample("shapes", (84, 84), 3)
    batch = build([sample], "shapes", tokenizer)
    learned = batch.targets[0][batch.targets[0] != NO_TARGET]
    text = tokenizer.decode(learned.tolist(), skip_special_tokens=False)
    assert text == "".join(f"{question.answer}<|im_end|>" for question in sample.questions)


def test_the_same_seed_draws_the_same_batch(tokenizer: Tokenizer) -> None:
    first, second = (
        draw_batch(np.random.default_rng(9), "pair", tokenizer, 2, 1.0, 3, held_out=False) for _ in range(2)
    )
    assert torch.equal(first.patches, second.patches)
    assert torch.equal(first.ids, second.ids)


def test_the_vocabulary_ends_in_the_special_tokens_of_qwen(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == SIZE
    assert tokenizer.token_to_id("<|video_pad|>") == SIZE - 1
