"""Requests with pictures for real engines over tiny checkpoints, and what they answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.load import load_engine
from dashinfer_vlm.processors.qwen import ProcessorConfig, process_image
from dashinfer_vlm.request import Item, Request, SamplingParams
from tests.tokens import IMAGE, VISION_END, VISION_START

NUM_TOKENS = 8


def picture(seed: int) -> np.ndarray:
    """Noise in one of nine sizes."""
    height, width = 56 + 28 * (seed % 3), 84 + 28 * (seed // 3 % 3)
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(value: int) -> np.ndarray:
    """A picture of one value everywhere: 255 is the poison of `bad_worker.py`, 254 what it refuses."""
    return np.full((56, 84, 3), value, dtype=np.uint8)


def request(folder: Path, name: str, *pictures: np.ndarray) -> Request:
    """A greedy request of random words around `pictures`."""
    ids: list[int] = []
    items = []
    for number, pixels in enumerate(pictures):
        done = process_image(pixels, ProcessorConfig.from_checkpoint(folder))
        num_tokens = int(np.prod(done.grid)) // 4
        ids += [300 + number, VISION_START, *[IMAGE] * num_tokens, VISION_END]
        items.append(
            Item(
                kind="image",
                start=len(ids) - num_tokens - 1,
                num_tokens=num_tokens,
                content_hash=hashlib.sha256(pixels.tobytes() + str(pixels.shape).encode()).digest(),
                grid=done.grid,
                patches=done.features,
            )
        )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return Request(id=name, prompt_ids=[*ids, 301, 302], items=tuple(items), params=params)


@dataclass(frozen=True)
class Answers:
    tokens: dict[str, list[int]]
    errors: dict[str, str]


def run(engine: Engine, requests: list[Request], *, after_step: Callable[[], None] = lambda: None) -> Answers:
    """Answer all requests, which start at once."""
    answers = Answers({r.id: [] for r in requests}, {})
    for each in requests:
        engine.add(each)
    while engine.has_work():
        for output in engine.step():
            answers.tokens[output.request_id] += output.token_ids
            if output.finish is not None and output.finish.reason == "error":
                answers.errors[output.request_id] = output.finish.message or ""
        after_step()
    engine.scheduler.check_integrity()
    engine.stage.cache.check_integrity()
    return answers


@contextmanager
def loaded(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine over the checkpoint in `folder`, closed at the end."""
    settings = {"dtype": "float32", "max_model_len": 256, "kv_cache_gib": 0.02, "threads": 1, **options}
    if settings.get("vision_workers"):
        settings.setdefault("vision_threads", 1)
    engine, _ = load_engine(EngineConfig(model=str(folder), **settings), lambda *_: None)
    try:
        yield engine
    finally:
        engine.close()
