"""What torch's allocator lends more after many requests, and which lines asked for it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from card_checks.models import make_engine, request, tokens_of
from card_checks.results import Check, Setting
from card_checks.rows import Row
from card_checks.service import card_model

Blocks = Counter[tuple[int, str]]
"""How many blocks are lent, by their bytes and by who asked for them."""

MOST_KINDS = 6
"""Of blocks that a row names."""


def memory(setting: Setting) -> Iterator[Check]:
    """What is lent more after 1,000 requests; those before fill workspaces and the cache of embeddings, which holds
    some 30 pictures of 500."""
    yield "memory over 1,000 requests", partial(_memory, setting)


def _memory(setting: Setting) -> Row:
    size, first, count = ("tiny", 2, 4) if setting.tiny else ("2b", 500, 1500)
    gc.collect()  # what is left of earlier checks
    with _asking_is_noted(setting):
        model = card_model(setting, size)
        engine = make_engine(model, 8192, 512, max_num_seqs=8 if setting.tiny else 32, vision_cache_gib=0.001)
        lent = []
        for begin, end in ((0, first), (first, count)):
            some = [
                request(model.config, str(i), [(1, 4, 6 + 2 * (i % 5))] * (i % 3 == 0), 5 + i % 60, 2 + i % 9, i)
                for i in range(begin, end)
            ]
            tokens_of(engine, some)
            setting.wait()
            lent.append(blocks_of(torch.cuda.memory_snapshot() if setting.device.type == "cuda" else []))
        engine.close()
    before, after = lent
    growth = float(num_bytes(after) - num_bytes(before))
    return Row(error=growth, allowed=2**24, note=f"growth in bytes, to {_mib(num_bytes(after))}; {told(before, after)}")


@contextmanager
def _asking_is_noted(setting: Setting) -> Iterator[None]:
    """The allocator keeps the Python lines behind each block that it lends: two microseconds each."""
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history("state", context="state", stacks="python")
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(None)


def blocks_of(segments: list[dict[str, Any]]) -> Blocks:
    """What is lent in a snapshot of `torch.cuda.memory_snapshot`."""
    return Counter(
        (block["size"], _who(block.get("frames", [])) + (" in a graph" if any(segment["segment_pool_id"]) else ""))
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    )


def _who(frames: list[dict[str, Any]]) -> str:
    """The innermost line of ours, or else of anybody."""
    ours = [frame for frame in frames if "dashinfer_vlm" in frame["filename"]] or frames
    return f"{Path(ours[0]['filename']).name}:{ours[0]['line']}" if ours else "nobody known"


def num_bytes(blocks: Blocks) -> int:
    return sum(size * count for (size, _), count in blocks.items())


def told(before: Blocks, after: Blocks) -> str:
    """Blocks that were not there before, the kinds that take most, and how much of others is gone."""
    more = sorted((after - before).items(), key=lambda item: -item[0][0] * item[1])
    new = ", ".join(f"{count} of {_mib(size)} by {who}" for (size, who), count in more[:MOST_KINDS])
    others = sum(size * count for (size, _), count in more[MOST_KINDS:])
    return f"new: {new or 'none'}, others {_mib(others)}; gone: {_mib(num_bytes(before - after))}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.3f} MiB"
