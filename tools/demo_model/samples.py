"""Training and test samples: pictures, the tokens before them, and several questions that share that beginning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from demo_model.figures import draw_chart, draw_receipt, squeezed
from demo_model.questions import Asker, Question, description, name, sentence
from demo_model.scenes import (
    CELL,
    COLOURS,
    HELD_OUT_FONTS,
    SHAPE_SIZES,
    SHAPES,
    TEXT_SIZES,
    TRAIN_FONTS,
    Pixels,
    Rng,
    Scene,
    Thing,
    cell_labels,
    damage,
    random_shapes,
    random_string,
    random_text,
    render,
    size_of,
)

KINDS = ("shapes", "text", "pair", "history", "frames", "video", "chart", "receipt")
MOVES = {"Left.": (-1, 0), "Right.": (1, 0), "Up.": (0, -1), "Down.": (0, 1)}


@dataclass(frozen=True, slots=True)
class Sample:
    """`beginning` holds text and picture numbers in the order of the conversation; the questions follow it one at a
    time.

    `pictures[i]` is what the i-th picture shows; with `is_video` the pictures are the frames of one video.
    """

    beginning: tuple[str | int, ...]
    pictures: tuple[Pixels, ...]
    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    is_video: bool = False


class Studio:
    """Draws samples of a kind; `progress` in 0..1 moves from few things on plain ground to the full set."""

    def __init__(self, rng: Rng, held_out: bool, progress: float = 1.0) -> None:
        self.rng, self.progress, self.held_out = rng, progress, held_out
        self.asker = Asker(rng, held_out)
        self.fonts = HELD_OUT_FONTS if held_out else TRAIN_FONTS
        self.hardness = min(0.6, 2 * progress)

    def sample(self, kind: str, size: tuple[int, int], num_questions: int) -> Sample:
        """A sample of one of KINDS with pictures of `size` (width, height) pixels."""
        if kind in ("shapes", "text"):
            return self.single(kind, size, num_questions)
        if kind in ("chart", "receipt"):
            return self.drawing(kind, size)
        if kind == "pair":
            return self.pair(size)
        return self.history(size) if kind == "history" else self.frames(size, kind == "video")

    def opening(self) -> str:
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if self.rng.random() < 0.1 else ""
        return f"{system}<|im_start|>user\n"

    def draw(self, scene: Scene) -> Pixels:
        return render(self.rng, scene, self.hardness)

    def single(self, kind: str, size: tuple[int, int], num_questions: int) -> Sample:
        if kind == "shapes":
            limit = 3 if self.progress < 0.08 else 4
            scene = random_shapes(self.rng, *size, int(self.rng.integers(1, limit + 1)), self.hardness)
        else:
            scene = random_text(self.rng, random_string(self.rng, size[0]), *size, self.fonts, self.rng.random() < 0.35)
        questions = self.asker.about(scene, num_questions)
        return Sample((self.opening(), 0), (self.draw(scene),), (scene,), tuple(questions))

    def drawing(self, kind: str, size: tuple[int, int]) -> Sample:
        """A bar chart or a receipt: figures that are drawn, not composed of things."""
        if kind == "chart":
            picture, bars = draw_chart(self.rng, *size)
            ranked = sorted(bars, key=lambda bar: bar[1])
            questions = [
                self.asker.ask("chart", word, sentence(bar[0]))
                for word, bar in (("tallest", ranked[-1]), ("shortest", ranked[0]))
            ]
            questions.append(self.asker.ask("count", "bars", str(len(bars))))
        else:
            picture, total = draw_receipt(self.rng, *size, str(self.rng.choice(self.fonts)))
            questions = [self.asker.ask("receipt", "", str(total))]
            if not self.held_out:
                picture = squeezed(self.rng, picture)
        shown = np.asarray(damage(self.rng, picture, self.hardness))
        return Sample((self.opening(), 0), (shown,), (Scene(*size, ()),), tuple(questions))

    def small_scene(self, size: tuple[int, int]) -> Scene:
        most = 2 if self.progress < 0.5 else 3
        return random_shapes(self.rng, *size, int(self.rng.integers(1, most)), 0.3 * self.hardness)

    def changed(self, scene: Scene) -> tuple[Scene, str]:
        """The scene with one large change, and the word for what changed."""
        which = int(self.rng.integers(len(scene.things)))
        thing = scene.things[which]
        aspect = ("colour", "shape", "number")[int(self.rng.integers(3))]
        if aspect == "number":
            more = self.with_one_more(scene) if len(scene.things) == 1 else replace(scene, things=scene.things[:1])
            return more, aspect
        options = COLOURS if aspect == "colour" else SHAPES
        taken = thing.colour if aspect == "colour" else thing.kind
        other = self.asker.pick([option for option in options if option != taken])
        new = replace(thing, colour=other) if aspect == "colour" else replace(thing, kind=other)
        return replace(scene, things=(*scene.things[:which], new, *scene.things[which + 1 :])), aspect

    def with_one_more(self, scene: Scene) -> Scene:
        while True:
            other = random_shapes(self.rng, scene.width, scene.height, 1, 0.0).things[0]
            if all(abs(other.x - thing.x) + abs(other.y - thing.y) > 0.4 * scene.width for thing in scene.things):
                return replace(scene, things=(*scene.things, other)).in_reading_order()

    def pair(self, size: tuple[int, int]) -> Sample:
        first = self.small_scene(size)
        second, answer = first, "No, they are the same."
        draw = self.rng.random()
        if draw < 0.55:
            second, aspect = self.changed(first)
            answer = f"Yes, the {aspect} is different."
        differs = (cell_labels(first).centre != cell_labels(second).centre).any(-1)
        cells = tuple((1, int(row), int(column)) for row, column in np.argwhere(differs))
        compare = replace(self.asker.ask("compare", "", answer), cells=cells)
        questions = [compare, *self.look_back((first, second))]
        again = replace(self.asker.ask("compare", "", answer), cells=cells)
        if not self.held_out and again.text != compare.text:
            questions.append(again)  # the hardest task, and only one question in three of a pair
        state = self.rng.bit_generator.state
        pictures = [self.draw(first)]
        if draw >= 0.55 and self.rng.random() < 0.5:
            self.rng.bit_generator.state = (
                state  # half of the equal pairs are equal to the pixel, the others drawn anew
            )
        pictures.append(self.draw(second))
        return Sample((self.opening(), 0, 1), tuple(pictures), (first, second), tuple(questions))

    def look_back(self, scenes: tuple[Scene, Scene]) -> list[Question]:
        order = [("first", scenes[0]), ("second", scenes[1])]
        return [self.asker.ask("earlier", word, description(scene.things)) for word, scene in order]

    def history(self, size: tuple[int, int]) -> Sample:
        scenes = (self.small_scene(size), self.small_scene(size))
        asked = [self.asker.about(scene, 3) for scene in scenes]
        turns: list[str | int] = [self.opening()]
        for i, questions in enumerate(asked):
            question = questions[int(self.rng.integers(len(questions)))]
            end = "<|im_end|>\n<|im_start|>user\n"
            turns += [i, f"{question.text}<|im_end|>\n<|im_start|>assistant\n{question.answer}{end}"]
        pictures = tuple(self.draw(scene) for scene in scenes)
        return Sample(tuple(turns), pictures, scenes, tuple(self.look_back(scenes)))

    def frames(self, size: tuple[int, int], is_video: bool) -> Sample:
        """One shape that crosses the picture in two or three images, or in the four frames of a video."""
        answer = self.asker.pick(list(MOVES))
        step_x, step_y = MOVES[answer]
        num_frames = 4 if is_video else int(self.rng.integers(2, 4))
        width, height = size
        span = self.rng.uniform(0.4, 0.62)
        side = 0.5 + self.rng.uniform(-0.3, 0.3)
        kind, colour = self.asker.pick(SHAPES), self.asker.pick(list(COLOURS))
        big = min(size) * self.rng.uniform(0.26, 0.34)
        state, scenes, pictures = self.rng.bit_generator.state, [], []
        for i in range(num_frames):
            along = (i / (num_frames - 1) - 0.5) * span
            x = width * ((0.5 + along * step_x) if step_x else side)
            y = height * ((0.5 + along * step_y) if step_y else side)
            scene = Scene(width, height, (Thing(kind, colour, x, y, big),))
            self.rng.bit_generator.state = state
            scenes.append(scene)
            pictures.append(self.draw(scene))
        move = [self.asker.ask("move", kind, answer) for _ in range(2)]
        what = Question(
            "move", self.asker.pick(("What moves?", "What is moving?")), sentence(name(scenes[0].things[0]))
        )
        questions = (move[0], what) if move[0].text == move[1].text else (*move, what)
        begin: tuple[str | int, ...] = (self.opening(), 0) if is_video else (self.opening(), *range(num_frames))
        return Sample(begin, tuple(pictures), tuple(scenes), questions, is_video)


def sizes_for(rng: Rng, kind: str, progress: float) -> tuple[int, int]:
    if kind == "receipt":
        return (84, 112)
    if kind == "text":
        return size_of(rng, TEXT_SIZES)
    return (
        SHAPE_SIZES[0]
        if progress < 0.1 or kind in ("pair", "history", "frames", "video", "chart")
        else size_of(rng, SHAPE_SIZES)
    )


def video_pairs(frames: tuple[Pixels, ...]) -> tuple[Pixels, ...]:
    """Frames two by two as their mean: with equal halves of the patch embedding that is what the model sees of a
    pair."""
    means = [(a.astype(np.float32) + b) / 2 for a, b in zip(frames[::2], frames[1::2], strict=True)]
    return tuple(mean for mean in means)  # type: ignore[misc]


def num_tokens(size: tuple[int, int]) -> int:
    return size[0] // CELL * (size[1] // CELL)
