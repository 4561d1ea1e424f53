"""How kernels are started, and the types that they compute in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "Tile",
    "check",
    "compute_type",
    "has_tiles",
    "is_roomy",
    "launch",
    "power_of_two",
    "starts_early",
    "unit_of",
    "wait_for_last",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run on the CPU, statement by statement."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch cuts its work: what a program takes at a time, and with what."""

    rows: int
    columns: int
    """Of attention: keys."""
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread at the most; None: as many as the compiler wants."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, early: bool = False, **options: Any) -> None:
    """Start `kernel` on the device and stream of its first argument, a tensor; an empty grid starts nothing.

    With `early` it may run before the kernel before it has ended, and must `wait_for_last`."""
    if 0 in grid:
        return
    if early:
        options["launch_pdl"] = True
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **options)


def starts_early(x: Tensor) -> bool:
    """Whether the card of x can start a kernel before the one before it has ended: programmatic dependent launch, from
    compute capability 9.0 on."""
    return not INTERPRETED and _capability(x.device) >= 90


def has_tiles(x: Tensor) -> bool:
    """Whether the card of x has an engine that copies tiles by their descriptors: from compute capability 9.0 on."""
    return INTERPRETED or _capability(x.device) >= 90


def is_roomy(x: Tensor) -> bool:
    """Whether a multiprocessor of x's card has 228 KiB of shared memory: Hopper's and those of Blackwell's servers."""
    return not INTERPRETED and 90 <= _capability(x.device) < 120


@cache
def _capability(device: torch.device) -> int:
    """Ten times the compute capability; without a card that of the one compiled for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return int(triton.runtime.driver.active.get_current_target().arch)


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Until what the kernels before have written is there; the next one may start.

    Every program must come here, also those that have nothing to do: a kernel that ends without having waited lets the
    next one go on while those before are at work. Before it only weights may be read, and what was there before the
    model call began."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def compute_type(dtype: torch.dtype) -> Any:
    """What the factors of a product are cast to: `dtype` itself, which the interpreter can do with float32 alone."""
    if INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def power_of_two(value: int, at_least: int = 1) -> int:
    """The smallest power of two from `value` and `at_least` on; tiles have no other sides."""
    return max(at_least, 1 << max(value - 1, 0).bit_length())


def unit_of(*strides: int) -> int:
    """What strides are handed over in multiples of, where the compiler would not see by itself that rows are aligned:
    it asks an integer only whether 16 divides it."""
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return next((unit for unit in (8, 4) if all(stride % unit == 0 for stride in strides)), 1)


def check(condition: bool, message: str, *found: Tensor) -> None:
    """ValueError with the shapes and types of what was found, before a kernel reads it."""
    if not condition:
        raise ValueError(f"{message}; found {', '.join(f'{x.dtype} {list(x.shape)}' for x in found)}")
