"""Drives a model as the engine does, and `transformers` beside it, over the same prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.models.base import EmbeddingRows, KVCache, Model, StepBatch
from dashinfer_vlm.models.loading import allocate_kv, load_model
from dashinfer_vlm.processors.qwen import ProcessorConfig, process_frames, process_image
from dashinfer_vlm.processors.videos import Qwen2Video
from dashinfer_vlm.request import Grid, Item
from tests.tokens import IMAGE, VIDEO

TEXT_IDS = 1000
"""Text tokens are drawn from ids below this."""
NUM_SEATS = 16
"""Sequences that a driver starts at most."""


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    items: tuple[Item, ...]
    processor: ProcessorConfig | None = None

    def hf_inputs(self) -> dict[str, torch.Tensor]:
        """The same prompt as `transformers` takes it, pixel values normalised by the processor's constants."""
        ids = torch.tensor([self.ids])
        if not self.items:
            return {"input_ids": ids}
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            items = [item for item in self.items if item.kind == kind and item.is_last_part]
            if items:
                inputs[pixels] = torch.cat([normalised(patches_of(item), self.processor) for item in items])
                inputs[grids] = torch.tensor([item.grid for item in items])
        if any(item.kind == "video" for item in self.items):
            seconds = [item.seconds_per_grid for item in self.items if item.kind == "video"]
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs


def patches_of(item: Item) -> torch.Tensor:
    assert item.patches is not None
    return torch.as_tensor(item.patches)


def normalised(patches: torch.Tensor, config: ProcessorConfig | None = None) -> torch.Tensor:
    """float32 [P, patch_dim] from uint8, as the processor of `transformers` does it."""
    config = config or ProcessorConfig()
    mean, std = (torch.tensor(x)[:, None] for x in (config.image_mean, config.image_std))
    return ((patches.view(len(patches), 3, -1) * config.rescale_factor - mean) / std).flatten(1)


def image(width: int, height: int, seed: int = 0, frames: int = 0, seconds_per_grid: float = 1.0) -> Item:
    """Noise of `width` by `height` pixels (multiples of 28); a video of `frames` frames where that is given."""
    pixels = np.random.default_rng(seed).integers(0, 256, (max(frames, 1), height, width, 3), dtype=np.uint8)
    config = ProcessorConfig(min_pixels=28 * 28, video=Qwen2Video(min_pixels=28 * 28))
    if frames:
        done = process_frames(pixels, config, num_frames=frames, seconds_per_grid=seconds_per_grid)
    else:
        done = process_image(pixels[0], config)
    return Item(
        kind="video" if frames else "image",
        start=0,
        num_tokens=len(done.features) // 4,
        content_hash=b"",
        grid=done.grid,
        patches=done.features,
        seconds_per_grid=seconds_per_grid,
    )


def prompt(*parts: int | Item, seed: int = 0) -> Prompt:
    """Numbers stand for so many random text tokens."""
    draw = random.Random(seed)
    ids: list[int] = []
    items: list[Item] = []
    for part in parts:
        if isinstance(part, int):
            ids += [draw.randrange(TEXT_IDS) for _ in range(part)]
            continue
        items.append(_at(part, len(ids)))
        ids += [IMAGE if part.kind == "image" else VIDEO] * part.num_tokens
    return Prompt(ids, tuple(items))


def _at(item: Item, start: int) -> Item:
    return Item(
        kind=item.kind,
        start=start,
        num_tokens=item.num_tokens,
        content_hash=item.content_hash,
        grid=item.grid,
        patches=item.patches,
        seconds_per_grid=item.seconds_per_grid,
    )


def load(folder: Path, dtype: str = "float32", vision_engine: str = "native", device: str = "cpu") -> Model:
    config: dict[str, Any] = {"dtype": dtype, "vision_engine": vision_engine, "device": device}
    return load_model(EngineConfig(model=str(folder), **config))


def load_hf(folder: Path) -> Any:
    sees = (folder / "preprocessor_config.json").exists()
    auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, dtype=torch.float32).eval()


def hf_logits(model: Any, prompt: Prompt) -> torch.Tensor:
    """float32 [T, vocab]."""
    with torch.no_grad():
        logits: torch.Tensor = model(**prompt.hf_inputs()).logits[0]
        return logits


def encode(model: Model, items: Sequence[Item], slices_at_once: int = 1000) -> list[torch.Tensor]:
    """For each run its rows of the embedding of the item that it is a part of."""
    whole = [item for item in items if item.is_last_part]
    grids = [item.grid or (0, 0, 0) for item in whole]
    made = run_vit(model, [patches_of(item) for item in whole], grids, slices_at_once) if whole else []
    numbers = accumulate(int(item.first_row == 0) for item in items)
    return [made[n - 1][i.first_row : i.first_row + i.num_tokens] for i, n in zip(items, numbers, strict=True)]


def run_vit(
    model: Model, patches: Sequence[torch.Tensor], grids: Sequence[Grid], slices_at_once: int = 1000
) -> list[torch.Tensor]:
    """Embeddings of uint8 [P_i, patch_dim] items."""
    encoder = model.encoder
    assert encoder is not None, "a text model"
    state = encoder.begin(patches, grids)
    while not state.done:
        encoder.run(state, slices_at_once)
    return encoder.finish(state)


class Life:
    """One prompt on its way through a model: its blocks lie in the cache in no order."""

    def __init__(self, driver: Driver, prompt: Prompt) -> None:
        self.ids = list(prompt.ids)
        self.items = prompt.items
        self.positions, self.offset = driver.model.positions(len(self.ids), self.items)
        self.embeddings = encode(driver.model, self.items)
        self.blocks = driver.take_blocks(len(self.ids) + 80)
        self.seat = driver.free_seats.pop()
        self.num_done = 0

    def append(self, token: int) -> None:
        """A generated token, which is to be run next."""
        position = torch.full((3, 1), len(self.ids) + self.offset)
        self.ids.append(token)
        self.positions = torch.cat([self.positions, position], dim=1)


class Driver:
    """A model with a KV cache of scattered blocks."""

    def __init__(
        self, model: Model, num_blocks: int = 200, block_size: int = 16, kv_dtype: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.kv: KVCache = allocate_kv(model, num_blocks, block_size, kv_dtype, num_seats=NUM_SEATS)
        for cache in (*self.kv.keys, *self.kv.values, *self.kv.states):
            # whoever reads what was never written, shows: an int8 row of -1 has the bytes of NaN as its scale
            cache.fill_(-1 if cache.dtype == torch.int8 else float("nan"))
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.free_seats = list(range(NUM_SEATS))

    def take_blocks(self, num_tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-num_tokens // self.block_size))]

    def start(self, prompt: Prompt) -> Life:
        return Life(self, prompt)

    def step(self, work: Sequence[tuple[Life, int]]) -> list[torch.Tensor]:
        """Run the next n tokens of each sequence in one call; float32 [n, vocab] of each."""
        batch = self._batch(work)
        logits = self.model.forward(batch, self.kv)
        for sequence, count in work:
            sequence.num_done += count
        return list(torch.split(logits, [count for _, count in work]))

    def run(self, sequence: Life, chunk: int = 1000) -> torch.Tensor:
        """Run all that is left, `chunk` tokens at a time; float32 [T, vocab]."""
        logits = []
        while (left := len(sequence.ids) - sequence.num_done) > 0:
            logits += self.step([(sequence, min(chunk, left))])
        return torch.cat(logits)

    def _batch(self, work: Sequence[tuple[Life, int]]) -> StepBatch:
        ids: list[int] = []
        positions, slots, embeddings = [], [], []
        starts = [0]
        for sequence, count in work:
            first, last = sequence.num_done, sequence.num_done + count
            for item, rows in zip(sequence.items, sequence.embeddings, strict=True):
                low, high = max(first, item.start), min(last, item.start + item.num_tokens)
                if low < high:
                    piece = rows[low - item.start : high - item.start]
                    embeddings.append(EmbeddingRows(start=len(ids) + low - first, rows=piece))
            ids += [0 if token in (IMAGE, VIDEO) else token for token in sequence.ids[first:last]]
            positions.append(sequence.positions[:, first:last])
            slots += [
                sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size
                for i in range(first, last)
            ]
            starts.append(len(ids))
        most = max(len(sequence.blocks) for sequence, _ in work)
        tables = [life.blocks + [0] * (most - len(life.blocks)) for life, _ in work]
        contexts = [life.num_done + count for life, count in work]
        device = self.model.device
        return StepBatch(
            ids=torch.tensor(ids, device=device),
            positions=torch.cat(positions, dim=1).to(device),
            slots=torch.tensor(slots, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            logits_rows=torch.arange(len(ids), device=device),
            embeddings=embeddings,
            seats=torch.tensor([life.seat for life, _ in work], device=device) if self.kv.states else None,
        )


def greedy(driver: Driver, case: Prompt, num_tokens: int, forbidden: tuple[int, ...] = ()) -> list[int]:
    """The likeliest continuation; `forbidden` tokens are passed over."""
    life = driver.start(case)
    row = driver.run(life)[-1]
    for _ in range(num_tokens):
        row[list(forbidden)] = -torch.inf
        life.append(int(row.argmax()))
        row = driver.step([(life, 1)])[0][0]
    return life.ids[len(case.ids) :]
