"""What the heaviest step takes of a card's memory, found by doing it before the KV cache takes the rest.

It warms up, too: what the kernels compile for it is compiled when the first request comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.placement import batch_patches
from dashinfer_vlm.kernels.choices import Choices
from dashinfer_vlm.layers import card_sampling
from dashinfer_vlm.models.base import KVCache, Model, StepBatch, VisionEncoder
from dashinfer_vlm.models.config import VisionConfig
from dashinfer_vlm.models.loading import allocate_kv

__all__ = ["CardMeter", "Meter", "largest_picture", "worst_step_bytes"]

logger = logging.getLogger(__name__)

MEASURED_GRID = (1, 64, 128)
"""8,192 patches. What the encoder takes grows with them, so that a larger picture need not be encoded."""
SLACK_BYTES = 1 << 30
"""For the static buffers of steps, what graphs and cuBLAS keep for themselves, and the allocator's holes."""


class Meter(Protocol):
    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that the device lends to `call` at the most, beyond what was taken before."""
        ...


class CardMeter:
    """Asks torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak


def worst_step_bytes(
    model: Model, vision: VisionConfig | None, config: EngineConfig, max_rows: int, meter: Meter
) -> int:
    """What must stay free beside the KV cache: the largest step of text twice (graphs have memory of their own), the
    largest picture or batch of pictures under way, and some slack."""
    kv = allocate_kv(model, 1, config.block_size)
    text = meter.peak_bytes(lambda: _step(model, kv, config.max_num_seqs, max_rows))
    picture = 0
    if model.encoder is not None and vision is not None:
        encoder, patch_dim = model.encoder, vision.patch_dim
        measured = meter.peak_bytes(lambda: _encode(encoder, patch_dim, model.device))
        rows, columns = MEASURED_GRID[1:]
        most = max(batch_patches("cuda", config), largest_picture(vision, config))
        picture = measured * most // (rows * columns)
    logger.info("worst step: %.2f GiB of text, %.2f GiB of the largest picture", text / 2**30, picture / 2**30)
    return 2 * text + picture + SLACK_BYTES


def largest_picture(vision: VisionConfig, config: EngineConfig) -> int:
    """Patches of the largest one that the processor makes."""
    bounded = vision.processor.with_server_bounds(config.min_pixels, config.max_pixels)
    return bounded.max_pixels // vision.patch_size**2


@torch.inference_mode()
def _step(model: Model, kv: KVCache, max_num_seqs: int, max_rows: int) -> None:
    """As many rows and sequences as a step may have, all in one block and seat; each wants a token, and asks for all
    that shapes it."""
    count, block_size = min(max_num_seqs, max_rows), kv.block_size
    starts = torch.arange(count + 1, device=model.device) * max_rows // count
    rows = torch.arange(max_rows, device=model.device)
    batch = StepBatch(
        ids=torch.zeros_like(rows),
        positions=torch.zeros_like(rows).expand(3, -1).contiguous(),
        slots=rows % block_size,
        query_starts=starts.int(),
        context_lens=starts.diff().int(),
        block_tables=torch.zeros(count, -(-max_rows // block_size), dtype=torch.int32, device=model.device),
        logits_rows=starts[1:] - 1,
        seats=torch.zeros_like(starts[1:]),
    )
    logits = model.forward(batch, kv)
    choices = _choices(count, model.text.vocab_size, model.device)
    choose = card_sampling.chooser(model.device)
    choose(logits, choices, card_sampling.shape(logits, choices, None), num_candidates=0)
    choose(logits, choices, num_candidates=0)


def _choices(count: int, vocab_size: int, device: torch.device) -> Choices:
    def column(value: float) -> Tensor:
        return torch.full((count,), value, device=device)

    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    lists = {f"{name}_{part}": nothing for name in ("bias", "seen", "forbidden") for part in ("starts", "ids")}
    columns = dict.fromkeys(("top_p", "repetition_penalty"), column(0.9))
    nothing_asked = dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), column(0.0))
    return Choices(
        temperature=column(1.0),
        top_k=column(50).int(),
        uniform=column(0.5),
        biases=nothing,
        seen_counts=nothing,
        mask=torch.full((count, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device),
        **columns,
        **nothing_asked,
        **lists,
    )


def _encode(encoder: VisionEncoder, patch_dim: int, device: torch.device) -> None:
    frames, rows, columns = MEASURED_GRID
    patches = torch.zeros(frames * rows * columns, patch_dim, dtype=torch.uint8, device=device)
    state = encoder.begin([patches], [MEASURED_GRID])
    while not state.done:
        encoder.run(state, 1)
    encoder.finish(state)
