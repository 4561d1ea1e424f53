"""Model calls of fixed shapes: captured once on a card and replayed, called again on a processor."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch

from dashinfer_vlm.engine.cards.staging import Shape

log = logging.getLogger(__name__)

DECODE_SIZES = (1, 2, 4, *range(8, 65, 8), 80, 96, 112, 128)
"""Sequences of a step that is nothing but decode."""
MIXED_SIZES = (64, 128, 256, 512, 1024, 2048)
"""Rows of any other step. Fewer than 64 cost as much: a card reads its weights meanwhile."""

Run = Callable[[Shape], None]
"""A model call over the static buffers, from arrays laid out for the shape to the static logits."""


@dataclass(frozen=True)  # no slots: every step looks for its shape in lists that are made once
class Shapes:
    """Which steps are padded to what."""

    max_sequences: int
    max_rows: int
    decode_sizes: tuple[int, ...] = DECODE_SIZES
    mixed_sizes: tuple[int, ...] = MIXED_SIZES

    def of(self, num_rows: int, num_sequences: int, num_logits: int, *, has_items: bool) -> Shape:
        """The smallest captured shape that a step fits in, or one of its own."""
        for shape in self.decode if num_rows == num_sequences and not has_items else self.mixed:
            if shape.fits(num_rows, num_sequences, num_logits):
                return shape
        return Shape(num_rows, num_sequences + (num_sequences == num_rows), num_logits, has_items=True)

    def all(self) -> Iterable[Shape]:
        """The largest first: what it needs, the others use again."""
        return sorted(chain(self.decode, self.mixed), key=lambda shape: -shape.num_rows)

    @property
    def largest(self) -> Shape:
        """No step needs more."""
        return Shape(self.max_rows, self.max_sequences + 1, self.max_rows, has_items=True)

    @cached_property
    def decode(self) -> list[Shape]:
        sizes = _up_to(self.decode_sizes, self.max_sequences)
        return [Shape(size, size, size, has_items=False) for size in sizes]

    @cached_property
    def mixed(self) -> list[Shape]:
        shapes = []
        for size in _up_to(self.mixed_sizes, self.max_rows):
            count = min(size, self.max_sequences)
            shapes.append(Shape(size, count + (count == size), count, has_items=True))
        return shapes


def _up_to(sizes: tuple[int, ...], most: int) -> list[int]:
    """Those below `most`, and it itself as far as the sizes go."""
    below = [size for size in sizes if size < most]
    return [*below, most] if len(below) < len(sizes) else below


class Graph(Protocol):
    def replay(self) -> None: ...


class Again:
    """In place of a graph where none can be captured: what reads a buffer that was not refilled goes wrong here too."""

    def __init__(self, run: Run, shape: Shape) -> None:
        self._run = run
        self._shape = shape

    def replay(self) -> None:
        self._run(self._shape)


class Graphs:
    """Those of one runner. They share one memory pool, which works because steps never run side by side."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._graphs: dict[Shape, Graph] = {}

    def __contains__(self, shape: Shape) -> bool:
        return shape in self._graphs

    def replay(self, shape: Shape) -> None:
        self._graphs[shape].replay()

    def capture(self, shapes: Iterable[Shape], prepare: Run) -> None:
        """`prepare` leaves arrays of a shape in the static buffers that a call can run over."""
        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        with _nothing_is_collected():
            for shape in shapes:
                prepare(shape)
                self._run(shape)  # compiles what is not compiled, which a capture cannot
                self._graphs[shape] = self._captured(shape, pool)
        log.info("%d graphs of steps are captured", len(self._graphs))

    def _captured(self, shape: Shape, pool: Any) -> Graph:
        if self._device.type != "cuda":
            return Again(self._run, shape)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # what other threads ask of the card meanwhile is none of the capture's business
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._run(shape)
        return graph


@contextmanager
def _nothing_is_collected() -> Iterator[None]:
    """Memory of a card that is freed while a graph is captured ends the capture, so what is in cycles is freed before
    and after."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
