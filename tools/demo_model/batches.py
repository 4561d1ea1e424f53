"""Samples as tensors: token ids, three-part positions, segments for the block mask, targets on the answers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from demo_model.model import patches_of
from demo_model.samples import KINDS, Sample, Studio, sizes_for, video_pairs
from demo_model.scenes import CELL, PATCH, cell_labels
from demo_model.vocabulary import special_id

NO_TARGET = -100
# shapes come before everything else is mixed in; after this many steps of a run the data stays as it is
CURRICULUM_STEPS = 800
DRAWN = ("chart", "receipt")  # figures without things in cells
DIFFERENCES = ("nothing", "shape", "colour", "both")


@dataclass(frozen=True, slots=True)
class Looks:
    """Where the token before an answer should look, for the questions that are about things in known cells."""

    rows: Tensor  # int64 [U]: the sample
    queries: Tensor  # int64 [U]: the token before the answer
    keys: Tensor  # bool [U, T]: the tokens of the things


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples of one kind and picture size; `segments` is 0 in the beginning, k in question k and -1 in the
    padding."""

    kind: str
    grid: tuple[int, int]  # patch rows and columns
    patches: Tensor  # float32 [N, P, 588]
    ids: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [3, B, T]
    segments: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]: the token that follows, inside the answers
    tasks: tuple[tuple[str, ...], ...]  # of the questions of each sample
    cells: tuple[Tensor, Tensor, Tensor] | None  # for the extra heads: kind, colour [N, P], centre [N, P / 4, 4]
    looks: Looks | None
    differs: Tensor | None  # of pairs: int64 [B, P / 4], what differs in a cell of the second picture (DIFFERENCES)

    def mask(self) -> Tensor:
        """True where a token may look: at the beginning and its own question, never ahead. Bool [B, 1, T, T]."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        causal = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool).tril()
        return (((key == 0) | (key == query)) & causal)[:, None]


class Writer:
    """Builds the token rows of one sample."""

    known: ClassVar[dict[str, list[int]]] = {}  # questions and answers come again and again

    def __init__(self, tokenizer: Tokenizer, cells: tuple[int, int]) -> None:
        self.tokenizer, self.cells = tokenizer, cells
        self.special = {
            text: special_id(tokenizer, text) for text in ("vision_start", "vision_end", "image_pad", "video_pad")
        }
        self.ids: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.segments: list[int] = []
        self.targets: list[int] = []
        self.picture_starts: list[int] = []
        self.looks: list[tuple[int, list[int]]] = []  # token before an answer, tokens of what it is about
        self.next_position = 0

    def add(self, ids: list[int], segment: int, learned: bool = False) -> None:
        for token in ids:
            if learned:
                self.targets[-1] = token
            self.ids.append(token)
            self.positions.append((self.next_position,) * 3)
            self.segments.append(segment)
            self.targets.append(NO_TARGET)
            self.next_position += 1

    def text(self, text: str, segment: int, learned: bool = False) -> None:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text).ids
        self.add(self.known[text], segment, learned)

    def picture(self, num_frames: int, pad: str) -> None:
        rows, columns = self.cells
        self.add([self.special["vision_start"]], 0)
        start = self.next_position
        self.picture_starts.append(len(self.ids))
        for frame in range(num_frames):
            for row in range(rows):
                for column in range(columns):
                    self.add([self.special[pad]], 0)
                    self.positions[-1] = (start + frame, start + row, start + column)
        self.next_position = start + max(num_frames, rows, columns)
        self.add([self.special["vision_end"]], 0)

    def sample(self, sample: Sample) -> None:
        for item in sample.beginning:
            if isinstance(item, str):
                self.text(item, 0)
            else:
                self.picture(
                    len(sample.pictures) // 2 if sample.is_video else 1, "video_pad" if sample.is_video else "image_pad"
                )
        start = self.next_position
        for segment, question in enumerate(sample.questions, 1):
            self.next_position = start
            self.text(f"{question.text}<|im_end|>\n<|im_start|>assistant\n", segment)
            if question.cells:
                keys = [self.picture_starts[i] + row * self.cells[1] + column for i, row, column in question.cells]
                self.looks.append((len(self.ids) - 1, keys))
            self.text(f"{question.answer}<|im_end|>", segment, learned=True)


def in_token_order(labels: np.ndarray) -> np.ndarray:
    """Patch labels [rows, columns] flattened in the order of `patches_of`."""
    rows, columns = labels.shape
    ordered: np.ndarray = labels.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1)
    return ordered


def cells_of(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    labels = [cell_labels(scene) for sample in samples for scene in sample.scenes]
    return (
        torch.from_numpy(np.stack([in_token_order(label.kind) for label in labels])),
        torch.from_numpy(np.stack([in_token_order(label.colour) for label in labels])),
        torch.from_numpy(np.stack([label.centre.reshape(-1, 4) for label in labels])),
    )


def looks_of(writers: list[Writer], longest: int) -> Looks | None:
    found = [(row, query, keys) for row, writer in enumerate(writers) for query, keys in writer.looks]
    if not found:
        return None
    marks = torch.zeros(len(found), longest, dtype=torch.bool)
    for mark, (_, _, keys) in zip(marks, found, strict=True):
        mark[keys] = True
    return Looks(torch.tensor([row for row, _, _ in found]), torch.tensor([query for _, query, _ in found]), marks)


def differences_of(samples: list[Sample]) -> Tensor:
    """What differs between the two pictures of each pair, per cell, as indices of DIFFERENCES."""
    pairs = [[cell_labels(scene).centre for scene in sample.scenes] for sample in samples]
    rows = []
    for first, second in pairs:
        shape, colour = (first[..., :2] != second[..., :2]).transpose(2, 0, 1)
        rows.append((shape + 2 * colour).reshape(-1))
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def build(samples: list[Sample], kind: str, tokenizer: Tokenizer) -> Batch:
    """Pads the samples, all of one picture size, to the longest of them."""
    width, height = samples[0].scenes[0].width, samples[0].scenes[0].height
    writers = []
    for sample in samples:
        writer = Writer(tokenizer, (height // CELL, width // CELL))
        writer.sample(sample)
        writers.append(writer)
    longest = max(len(writer.ids) for writer in writers)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    segments, targets = torch.full_like(ids, -1), torch.full_like(ids, NO_TARGET)
    positions = torch.zeros(3, len(samples), longest, dtype=torch.int64)
    for i, writer in enumerate(writers):
        size = len(writer.ids)
        ids[i, :size] = torch.tensor(writer.ids)
        segments[i, :size] = torch.tensor(writer.segments)
        targets[i, :size] = torch.tensor(writer.targets)
        positions[:, i, :size] = torch.tensor(writer.positions).T
    shown = [video_pairs(sample.pictures) if sample.is_video else sample.pictures for sample in samples]
    return Batch(
        kind,
        (height // PATCH, width // PATCH),
        torch.from_numpy(patches_of(np.stack([picture for pictures in shown for picture in pictures]))),
        ids,
        positions,
        segments,
        targets,
        tuple(tuple(question.task for question in sample.questions) for sample in samples),
        None if kind == "video" or kind in DRAWN else cells_of(samples),
        looks_of(writers, longest),
        differences_of(samples) if kind == "pair" else None,
    )


def kind_at(rng: np.random.Generator, progress: float) -> str:
    """Single pictures first; then pairs, histories, frames, videos and figures join."""
    later = float(np.clip((progress - 0.15) / 0.15, 0.0, 1.0))
    first = np.array([0.72, 0.28, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    last = np.array([0.34, 0.15, 0.16, 0.07, 0.04, 0.05, 0.04, 0.15])
    weights = (1 - later) * first + later * last
    return KINDS[int(rng.choice(len(KINDS), p=weights / weights.sum()))]


class Batches(Dataset[Batch]):
    """Batch number `i` is drawn from (seed, i) alone, so that a resumed run sees what an unbroken one would.

    The batches of one step, one for each process, are of one kind.
    """

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        batch: int,
        num_steps: int,
        num_processes: int,
        first_progress: float = 0.0,
    ) -> None:
        """`first_progress` in 0..1 skips that part of the curriculum."""
        self.seed, self.tokenizer, self.batch = seed, tokenizer, batch
        self.num_steps, self.num_processes = num_steps, num_processes
        self.first_progress = first_progress

    def __len__(self) -> int:
        return self.num_steps * self.num_processes

    def __getitem__(self, index: int) -> Batch:
        step = index // self.num_processes
        shared = np.random.default_rng((self.seed, 1, step))
        progress = min(1.0, self.first_progress + step / CURRICULUM_STEPS)
        kind = kind_at(shared, progress)
        rng = np.random.default_rng((self.seed, 2, index))
        return draw_batch(rng, kind, self.tokenizer, self.batch, progress, 6)


def draw_batch(
    rng: np.random.Generator,
    kind: str,
    tokenizer: Tokenizer,
    batch: int,
    progress: float,
    num_questions: int,
    *,
    held_out: bool = False,
) -> Batch:
    studio = Studio(rng, held_out, progress)
    size = sizes_for(rng, kind, progress)
    samples = [studio.sample(kind, size, num_questions) for _ in range(batch)]
    return build(samples, kind, tokenizer)
