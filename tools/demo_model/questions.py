"""Questions about scenes and their true answers, in phrasings for training and others held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from demo_model.scenes import CELL, COLOURS, COLUMNS, ROWS, SHAPES, Rng, Scene, Thing

# task: (phrasings for training, phrasings held out); the words of both are the same
PHRASINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "describe": (
        (
            "Describe the image.",
            "Describe the picture.",
            "What is in the picture?",
            "What do you see?",
            "What is in this image?",
            "Describe this picture.",
            "What does the picture show?",
            "What can you see?",
        ),
        ("What does the image show?", "What can you see in the picture?", "Describe this image."),
    ),
    "json": (
        (
            "Describe the picture as JSON.",
            "Describe the image as JSON.",
            "Describe this picture in JSON.",
            "What is in the picture? Answer in JSON.",
            "What is in this image? Answer as JSON.",
            "What do you see? Answer as JSON.",
            "What can you see? Answer in JSON.",
            "What does the picture show? Tell me in JSON.",
            "Which shape is it? Tell me as JSON.",
        ),
        (
            "Describe this image as JSON.",
            "What can you see in the picture? Answer as JSON.",
            "What does the image show? Answer in JSON.",
        ),
    ),
    "colour": (
        (
            "What colour is the {}?",
            "What color is the {}?",
            "Which colour does the {} have?",
            "Tell me the colour of the {}.",
            "What is the color of the {}?",
        ),
        ("What is the colour of the {}?", "Which colour is the {}?", "Tell me the color of the {}."),
    ),
    "shape": (
        ("What shape is {}?", "Which shape is {}?", "What is the {} thing?", "Tell me the shape of the {} thing."),
        ("Which thing is {}?", "What shape is the {} thing?"),
    ),
    "count": (
        ("How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the image?"),
        ("How many {} can you see?", "How many {} are in the picture?"),
    ),
    "read": (
        (
            "What does the text say?",
            "Read the text.",
            "What is written in the picture?",
            "What is written here?",
            "What does it say?",
            "What text do you see?",
        ),
        ("What does the text in the picture say?", "Read the text in the image.", "What text is in the picture?"),
    ),
    "where": (
        (
            "Where is the {}?",
            "Where do you see the {}?",
            "In which part of the picture is the {}?",
            "Tell me where the {} is.",
        ),
        ("Where in the picture is the {}?", "Where can you see the {}?"),
    ),
    "at": (
        ("What is in the {}?", "What do you see in the {}?", "Which shape is in the {}?"),
        ("What can you see in the {}?", "What shape is in the {}?"),
    ),
    "exists": (
        ("Is there a {}?", "Do you see a {}?", "Is there a {} in the picture?", "Can you see a {} in the picture?"),
        ("Is there a {} in the image?", "Can you see a {}?"),
    ),
    "compare": (
        (
            "Are these images different?",
            "Are these pictures different?",
            "Is there a difference?",
            "Are the two images different?",
            "Is there a difference in these pictures?",
        ),
        ("Are the two pictures different?", "Are the images different?", "Is there a difference in these images?"),
    ),
    "earlier": (
        (
            "What was in the {} picture?",
            "What was in the {} image?",
            "What did you see in the {} picture?",
            "Describe the {} picture.",
        ),
        ("What did you see in the {} image?", "Describe the {} image."),
    ),
    "chart": (
        ("Which bar is the {}?", "Which bar is {}?", "What colour is the {} bar?"),
        ("What is the {} bar?", "Which colour is the {} bar?"),
    ),
    "receipt": (
        ("What is the total?", "How much is the total?", "Read the total.", "What does the receipt total?"),
        ("How much is it in total?", "What is the total of the receipt?"),
    ),
    "move": (
        (
            "Which way does the {} move?",
            "Which way does it move?",
            "Where does the {} move?",
            "Tell me which way the {} moves.",
        ),
        ("Where does it move?", "Which way is the {} moving?"),
    ),
}
TASKS = tuple(PHRASINGS)
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
assert set(PLACES) >= {*ROWS, *COLUMNS} - {"middle"}


@dataclass(frozen=True, slots=True)
class Question:
    """One question, the task it belongs to, its only right answer, and where to look for that."""

    task: str
    text: str
    answer: str
    cells: tuple[tuple[int, int, int], ...] = ()  # picture, cell row and cell column of the things it is about


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def name(thing: Thing) -> str:
    """ "a red circle", "the word CAT in blue", "the number 42 in black"."""
    if thing.is_text:
        return f"the {'number' if thing.kind.isdigit() else 'word'} {thing.kind} in {thing.colour}"
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.kind}"


def description(things: Sequence[Thing]) -> str:
    names = [name(thing) for thing in things]
    if not names:
        return "Nothing."
    return sentence(names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1])


class Asker:
    """Draws phrasings; `held_out` takes those that training never uses."""

    def __init__(self, rng: Rng, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def ask(self, task: str, about: str, answer: str, things: Sequence[Thing] = ()) -> Question:
        cells = tuple((0, int(thing.y) // CELL, int(thing.x) // CELL) for thing in things)
        return Question(task, self.pick(PHRASINGS[task][self.held_out]).format(about), answer, cells)

    def describe(self, scene: Scene) -> Question:
        return self.ask("describe", "", description(scene.things))

    def as_json(self, thing: Thing) -> Question:
        return self.ask("json", "", json.dumps({"shape": thing.kind, "colour": thing.colour}), [thing])

    def read(self, text: Thing) -> Question:
        return self.ask("read", "", text.kind)

    def unique(self, scene: Scene, thing: Thing) -> str | None:
        """What the thing alone can be called: its shape, or its colour and shape."""
        if thing.is_text:
            return "text"
        same_kind = [other for other in scene.things if other.kind == thing.kind]
        if len(same_kind) == 1:
            return f"{thing.colour} {thing.kind}" if self.rng.random() < 0.15 else thing.kind
        if [other.colour for other in same_kind].count(thing.colour) == 1:
            return f"{thing.colour} {thing.kind}"
        return None

    def colour(self, scene: Scene) -> Question | None:
        kinds = [thing.kind for thing in scene.things]
        single = [thing for thing in scene.things if kinds.count(thing.kind) == 1]
        if not single:
            return None
        thing = single[int(self.rng.integers(len(single)))]
        return self.ask("colour", "text" if thing.is_text else thing.kind, sentence(thing.colour), [thing])

    def shape(self, scene: Scene) -> Question | None:
        colours = [thing.colour for thing in scene.things]
        single = [thing for thing in scene.shapes if colours.count(thing.colour) == 1]
        if not single:
            return None
        thing = single[int(self.rng.integers(len(single)))]
        return self.ask("shape", thing.colour, sentence(f"the {thing.kind}"), [thing])

    def count(self, scene: Scene) -> Question:
        draw = self.rng.random()
        present = bool(scene.shapes) and self.rng.random() < 0.85
        if draw < 0.4:
            return self.ask("count", "shapes", str(len(scene.shapes)), scene.shapes)
        if draw < 0.75:
            options = [thing.kind for thing in scene.shapes] if present else list(SHAPES)
            kind = self.pick(options)
            found = [thing for thing in scene.shapes if thing.kind == kind]
            return self.ask("count", "crosses" if kind == "cross" else f"{kind}s", str(len(found)), found)
        options = [thing.colour for thing in scene.shapes] if present else list(COLOURS)
        colour = self.pick(options)
        found = [thing for thing in scene.shapes if thing.colour == colour]
        return self.ask("count", f"{colour} shapes", str(len(found)), found)

    def where(self, scene: Scene) -> Question | None:
        options = [thing for thing in scene.shapes if self.unique(scene, thing)]
        if not options:
            return None
        thing = options[int(self.rng.integers(len(options)))]
        return self.ask("where", self.unique(scene, thing) or "", sentence(scene.place(thing)), [thing])

    def at(self, scene: Scene) -> Question | None:
        if not scene.shapes:
            return None
        thing = scene.shapes[int(self.rng.integers(len(scene.shapes)))]
        return self.ask("at", scene.place(thing), sentence(name(thing)), [thing])

    def exists(self, scene: Scene) -> Question:
        draw = self.rng.random()
        kind = self.pick([thing.kind for thing in scene.shapes] if scene.shapes and draw < 0.5 else SHAPES)
        colour = ""
        if self.rng.random() < 0.4:
            colour = self.pick(
                [thing.colour for thing in scene.shapes] if scene.shapes and draw < 0.7 else list(COLOURS)
            )
        found = [thing for thing in scene.shapes if thing.kind == kind and colour in ("", thing.colour)]
        return self.ask("exists", f"{colour} {kind}".strip(), "Yes." if found else "No.", found)

    def about(self, scene: Scene, num_questions: int) -> list[Question]:
        """Different questions about one picture, its main one first."""
        found: list[Question | None] = []
        if scene.text is not None:
            found.append(self.read(scene.text))
        if len(scene.things) <= 4:
            found.append(self.describe(scene))
        if not self.held_out and len(scene.things) == len(scene.shapes) == 1:  # what is held out came before it
            found += [self.as_json(scene.shapes[0]) for _ in range(2)]  # few pictures have one shape alone
        rest = [self.colour(scene), self.colour(scene), self.where(scene), self.where(scene), self.shape(scene)]
        rest += [self.count(scene), self.count(scene), self.colour(scene)]
        if self.held_out:
            rest += [self.at(scene), self.exists(scene)] if self.rng.random() < 0.25 else []
        else:
            rest += [self.at(scene), self.exists(scene), self.exists(scene)]
        if scene.text is not None and not scene.shapes:
            rest = [self.colour(scene), self.count(scene), self.exists(scene)][: 1 + int(self.rng.integers(3))]
        order = self.rng.permutation(len(rest))
        found += [rest[i] for i in order]
        unique: dict[str, Question] = {question.text: question for question in found if question is not None}
        return list(unique.values())[:num_questions]
