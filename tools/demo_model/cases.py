"""Held-out questions as conversations, for any program that answers conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo_model.samples import KINDS, Sample, Studio, sizes_for

HELD_OUT_SEED = 90_001
MAX_TOKENS = 40
"""Of an answer; the longest true ones are shorter."""
PICTURE_MARK = "\0"


@dataclass(frozen=True, slots=True)
class Case:
    """One question at the end of a conversation.

    `messages` hold text parts and `{"type": "image" | "video", "index": i}`, where `i` counts into `media`: one
    picture, or the frames of a video.
    """

    task: str
    kind: str
    messages: list[dict[str, Any]]
    media: list[list[Image.Image]]
    answer: str


def content_parts(text: str, num_seen: int, kind: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for piece in re.split(f"({PICTURE_MARK})", text):
        if piece == PICTURE_MARK:
            parts.append({"type": kind, "index": num_seen + sum(part["type"] != "text" for part in parts)})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def messages_of(sample: Sample, question: str) -> list[dict[str, Any]]:
    """The conversation that ends in a question, out of the text that training writes."""
    flat = "".join(item if isinstance(item, str) else PICTURE_MARK for item in sample.beginning) + question
    messages: list[dict[str, Any]] = []
    num_seen = 0
    for turn in flat.split("<|im_start|>")[1:]:
        role, _, text = turn.partition("\n")
        text = text.removesuffix("\n").removesuffix("<|im_end|>")
        parts = content_parts(text, num_seen, "video" if sample.is_video else "image")
        num_seen += sum(part["type"] != "text" for part in parts)
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        messages.append({"role": role, "content": parts[0]["text"] if plain else parts})
    return messages


def held_out_cases(num_questions: int, seed: int = HELD_OUT_SEED) -> Iterator[Case]:
    """Questions over all kinds of samples, with fonts, phrasings and seeds that training never saw."""
    made = 0
    weights = np.array([0.26, 0.22, 0.26, 0.1, 0.07, 0.05, 0.02, 0.02])
    while made < num_questions:
        rng = np.random.default_rng((seed, made))
        kind = KINDS[int(rng.choice(len(KINDS), p=weights))]
        sample = Studio(rng, held_out=True).sample(kind, sizes_for(rng, kind, 1.0), 6)
        pictures = [Image.fromarray(picture) for picture in sample.pictures]
        media = [pictures] if sample.is_video else [[picture] for picture in pictures]
        for question in sample.questions[: num_questions - made]:
            made += 1
            yield Case(question.task, kind, messages_of(sample, question.text), media, question.answer)


def with_media(case: Case) -> list[dict[str, Any]]:
    """The messages with the pictures themselves in place of their numbers."""
    messages = []
    for message in case.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [filled(part, case.media) for part in content]
        messages.append({"role": message["role"], "content": content})
    return messages


def filled(part: dict[str, Any], media: list[list[Image.Image]]) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "image": media[part["index"]][0]}
    if part["type"] == "video":
        return {"type": "video", "video": media[part["index"]]}
    return part


def write_cases(cases: list[Case], said: list[str], folder: Path) -> None:
    """PNG files and one `cases.json`, so that a test needs neither the generator nor its fonts.

    `said` are the answers of the recorded program, right or wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[bytes, str] = {}
    rows = []
    for case, answer in zip(cases, said, strict=True):
        media = [[written(picture, names, folder) for picture in pictures] for pictures in case.media]
        rows.append({"task": case.task, "messages": case.messages, "media": media})
        rows[-1] |= {"answer": case.answer, "said": answer}
    (folder / "cases.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n")


def written(picture: Image.Image, names: dict[bytes, str], folder: Path) -> str:
    key = picture.tobytes()
    if key not in names:
        names[key] = f"{len(names):03d}.png"
        picture.save(folder / names[key], optimize=True)
    return names[key]
