"""What `transformers` answers in float32, and where its answer hung on less than bfloat16 can tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from demo_model.cases import MAX_TOKENS, Case


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer; texts are whole answers up to and with that token, the end of the answer included."""

    text: str
    rival: str
    """With the second best token in its place."""
    is_tie: bool
    """The two logits are closer than neighbouring bfloat16 numbers of their size."""


@dataclass(frozen=True, slots=True)
class Spoken:
    text: str
    steps: tuple[Step, ...]

    def differs_by_a_tie(self, said: str) -> bool:
        """Whether another answer leaves this one at a tie, and by the second best token."""
        apart = next((step for step in self.steps if not said.startswith(step.text)), self.steps[-1])
        return apart.is_tie and said.startswith(apart.rival)


class Reference:
    """One greedy answer at a time in float32; a video goes in as the frames that its processor would cut into
    patches."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def answers(self, cases: Iterable[Case]) -> Iterator[Spoken]:
        for case in cases:
            inputs = self.inputs(case)
            with torch.no_grad():
                out = self.model.generate(
                    **inputs, max_new_tokens=MAX_TOKENS, output_logits=True, return_dict_in_generate=True
                )
            ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            steps = tuple(self._step(ids, i, logits[0]) for i, logits in enumerate(out.logits))
            yield Spoken(self._text(ids), steps)

    def inputs(self, case: Case) -> dict[str, Any]:
        """What `generate` takes."""
        text = self.tokenizer.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=True)
        is_video = case.kind == "video"
        pad = "<|video_pad|>" if is_video else "<|image_pad|>"
        patches, grids = zip(*(self._patches(pictures, is_video) for pictures in case.media), strict=True)
        for grid in grids:
            text = text.replace(pad, "<|pad|>" * int(grid.prod() // 4), 1)
        ids = self.tokenizer(text.replace("<|pad|>", pad), return_tensors="pt").input_ids
        config = self.model.config
        kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        names = ("pixel_values_videos", "video_grid_thw") if is_video else ("pixel_values", "image_grid_thw")
        media = dict(zip(names, (torch.cat(patches), torch.cat(grids)), strict=True))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **media}

    def _patches(self, pictures: list[Any], is_video: bool) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.processor(images=pictures, return_tensors="pt")
        grid, pixels = made["image_grid_thw"][:1].clone(), self.processor.patch_size**2
        values = made["pixel_values"].view(len(pictures), -1, 3, 2, pixels)
        if is_video:
            grid[0, 0] = len(pictures) // 2
            values = values[:, :, :, 0].view(len(pictures) // 2, 2, -1, 3, pixels).permute(0, 2, 3, 1, 4)
        return values.reshape(-1, made["pixel_values"].shape[1]), grid

    def _step(self, ids: list[int], place: int, logits: torch.Tensor) -> Step:
        (best, second), (_, rival) = (x.tolist() for x in logits.float().topk(2))
        is_tie = best - second < bfloat16_spacing(max(abs(best), abs(second)))
        return Step(self._text(ids[: place + 1]), self._text([*ids[:place], rival]), is_tie)

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def bfloat16_spacing(value: float) -> float:
    """Between neighbouring bfloat16 numbers at `value`, which is positive: 8 bits of significand."""
    return 2.0 ** (math.frexp(value)[1] - 8)
