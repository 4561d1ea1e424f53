"""Attention, experts and states with other tiles than those that are served: what a card says decides which are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from card_checks import delta_net, experts
from card_checks.attention import Heads, attention_of_pictures, attention_over_a_cache, decode_alone
from card_checks.cases import BFLOAT16_ERROR, Case
from card_checks.results import Check, Setting, error
from card_checks.rows import Row

Cut = tuple[int, int, int, int, int | None]
"""A `Tile`: rows, keys, warps, stages, most registers."""
OF_2B, OF_7B, TINY = Heads(12, 2, 128), Heads(28, 4, 128), Heads(6, 2, 32)


@dataclass(frozen=True, slots=True)
class Contest:
    """One call, and how it could be cut."""

    case: Case
    module: ModuleType
    function: str
    """Of the module; it chooses the tile that is served."""
    cuts: tuple[Cut, ...]

    def ways(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The call as it is served, then with each other tile."""
        from dashinfer_vlm.kernels.cuda.launch import Tile  # triton reads the environment when it is imported

        yield "served", self.case.run
        for cut in self.cuts:
            yield _name(cut), partial(self._run, Tile(*cut))

    def _run(self, tile: object) -> object:
        with mock.patch.object(self.module, self.function, return_value=tile):
            return self.case.run()


FEW: tuple[Cut, ...] = (
    *((16, 64, warps, 5, None) for warps in (2, 4)),
    *((16, 128, warps, 2, None) for warps in (4, 8)),
    (16, 128, 4, 3, None),
)
FEW_INT8: tuple[Cut, ...] = (
    *((16, 64, warps, 2, None) for warps in (2, 4)),
    *((16, 128, warps, 2, None) for warps in (4, 8)),
    (16, 64, 4, 5, None),
)
MANY: tuple[Cut, ...] = (
    *((64, 64, 4, stages, None) for stages in (2, 3, 5)),
    *((128, 64, 8, 2, registers) for registers in (None, 128)),
    *((128, keys, 8, 5, None) for keys in (64, 128)),
)
MANY_INT8: tuple[Cut, ...] = (
    *((128, 64, 8, 2, registers) for registers in (None, 128)),
    *((rows, 64, 4, 2, None) for rows in (64, 128)),
    (64, 128, 4, 2, None),
    (64, 32, 4, 3, None),
    (128, 32, 8, 2, 128),
    (128, 64, 8, 5, None),
)
FRAMES: tuple[Cut, ...] = (
    *((128, 64, 4, stages, None) for stages in (2, 4)),
    *((128, 64, 8, 3, registers) for registers in (None, 128)),
    (128, 32, 4, 3, None),
    (64, 64, 4, 2, 168),
    (128, 128, 8, 3, None),
)
EXPERTS: tuple[Cut, ...] = (
    *((rows, 128, 4, stages, None) for rows in (16, 32, 64) for stages in (3, 4)),
    *((128, 128, warps, stages, None) for warps in (8, 16) for stages in (3, 4)),
)
"""Pairs of a tile, and columns."""
EXPERTS_FEW_BITS: tuple[Cut, ...] = (
    *((rows, 128, warps, stages, None) for rows in (16, 32) for warps in (4, 8) for stages in (3, 5)),
    *((64, 128, warps, stages, None) for warps in (4, 8) for stages in (3, 4)),
    *((128, 128, warps, 3, None) for warps in (4, 8)),
)
PREPARED: tuple[Cut, ...] = (
    *((64, 64, 4, 1, registers) for registers in (None, 128)),
    *((64, 64, 8, 1, registers) for registers in (None, 128)),
)
"""Rows of a chunk, and columns of keys and values."""
WALKED: tuple[Cut, ...] = (
    *((64, 32, warps, stages, None) for warps in (4, 8) for stages in (2, 3)),
    *((64, 64, 8, stages, None) for stages in (1, 2, 3)),
    (64, 16, 4, 2, None),
    (64, 64, 4, 2, None),
)
"""Rows of a chunk, and columns of a memory."""
WINDOWS: tuple[Cut, ...] = ((64, 64, 4, 2, None), (64, 32, 4, 3, None))
"""None of one stage: what ptxas makes of it faults (`sass.raw_descriptors`)."""


def tiles(setting: Setting) -> Iterator[Check]:
    for contest in _contests(setting):
        yield contest.case.name, partial(_times, setting, contest)


def every_tile(setting: Setting) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, without its times."""
    for contest in _contests(setting):
        for name, way in contest.ways():
            yield f"{contest.case.name}, {name}", way


def _contests(setting: Setting) -> Iterator[Contest]:
    from dashinfer_vlm.kernels.cuda import (
        delta_chunks,
        experts_floats,
        experts_grouped,
        paged,
        segments,
    )  # triton reads the environment when it is imported

    over_a_cache = partial(attention_over_a_cache, setting, torch.bfloat16)
    if setting.tiny:
        decode = decode_alone(setting, torch.bfloat16, "decode", TINY, [3, 70])
        yield Contest(decode, paged, "few_tile", ((16, 32, 1, 2, None),))
        for kind in ("bfloat16", "int8"):
            prompt = over_a_cache(f"prompt over {kind}", TINY, [40], [60], getattr(torch, kind))
            yield Contest(prompt, paged, "many_tile", ((32, 16, 1, 2, None),))
        pictures = attention_of_pictures(setting, torch.bfloat16, "frames", [37, 5], 2, 80)
        yield Contest(pictures, segments, "tile_for", ((16, 32, 1, 1, None),))
        *_, prompts = delta_net.cases(setting, torch.bfloat16, small=True)
        yield Contest(prompts, delta_chunks, "walk_tile", ((64, 16, 4, 1, None),))
        return
    for size, heads in (("2b", OF_2B), ("7b", OF_7B)):
        for name, count, length in (("1 of 1k", 1, 1024), ("16 of 1k", 16, 1024), ("64 of 1k", 64, 1024)):
            case = decode_alone(setting, torch.bfloat16, f"{size} decode {name}", heads, [length] * count)
            yield Contest(case, paged, "few_tile", FEW)
        for name, count in (("1 of 1k", 1), ("64 of 1k", 64)):
            case = over_a_cache(f"{size} decode {name} over int8", heads, [1] * count, [1024] * count, torch.int8)
            yield Contest(case, paged, "few_tile", FEW_INT8)
        for name, length in (("8k", 8192), ("1k", 1024)):
            prompt = partial(over_a_cache, heads=heads, rows=[length], contexts=[length])
            yield Contest(prompt(f"{size} prompt {name}"), paged, "many_tile", MANY)
            yield Contest(prompt(f"{size} prompt {name} over int8", cache=torch.int8), paged, "many_tile", MANY_INT8)
    for case in experts.in_blocks(setting, (16, 64, 256, 2048)):
        yield Contest(case, experts_floats, "tile_for", EXPERTS)
    for bits in (8, 4):
        for case in experts.in_few_bits(setting, bits, (16, 64, 256, 2048)):
            yield Contest(case, experts_grouped, "tile_for", EXPERTS_FEW_BITS)
    for case in delta_net.cases(setting, torch.bfloat16, small=False):
        if "prefill" in case.name:
            yield Contest(case, delta_chunks, "prepare_tile", PREPARED)
            yield Contest(replace(case, name=f"{case.name}, walked through"), delta_chunks, "walk_tile", WALKED)
    long = decode_alone(setting, torch.bfloat16, "7b decode 8 of 8k", OF_7B, [8192] * 8)
    yield Contest(long, paged, "few_tile", FEW)
    for name, lengths, dim, cuts in (
        ("4 pictures of 1024^2", [5476] * 4, 80, FRAMES),
        ("heads of 72", [4096] * 4, 72, FRAMES),
        ("windows", [64] * 342, 80, WINDOWS),
    ):
        pictures = attention_of_pictures(setting, torch.bfloat16, name, lengths, 16, dim)
        yield Contest(pictures, segments, "tile_for", cuts)


def _times(setting: Setting, contest: Contest) -> Row:
    """Those that a card has no room for are noted."""
    found: dict[str, float] = {}
    notes, worst, case = [], 0.0, contest.case
    want = case.run()
    for name, way in contest.ways():
        try:
            worst = max(worst, error(way(), want))
            found[name] = setting.time(way, as_graph=True)
        except Exception as failure:
            if type(failure).__name__ != "OutOfResources":
                raise
            notes.append(f"{name}: {failure}")
    floor = setting.ceilings.seconds(num_bytes=case.num_bytes, attention_flops=case.flops)
    return Row(
        seconds=found.pop("served"), floor=floor, error=worst, allowed=BFLOAT16_ERROR, note="; ".join(notes),
        others=found,
    )  # fmt: skip


def _name(cut: Cut) -> str:
    *sides, registers = cut
    return " ".join(map(str, sides)) + (f" {registers}" if registers else "")
