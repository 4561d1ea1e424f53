"""Where a request's time goes: the stages that it passes, told by whoever does the work, and carried along with what
comes of it.

Times are seconds on `time.perf_counter`'s clock, which all processes of a machine share on Linux.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import msgspec

__all__ = ["STAGES", "Span", "Stage", "since", "timed"]

Stage = Literal[
    "fetch",  # the bytes of an item: from its host, or out of a data URL
    "decode_wait",  # until a decoding process is free
    "decode",  # bytes to pixels
    "preprocess",  # pixels to patches
    "encode_wait",  # in the queue of the vision encoder
    "encode",  # from the encoder's first look at an item to its embedding
    "prefill_wait",  # from the engine's door to the first chunk of the prompt
    "prefill",  # from there to the first token; the encoder's stages lie within it
    "detokenise",  # ids to text, of a whole answer
]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One stage of one request, item or answer."""

    stage: Stage
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@contextmanager
def timed(stage: Stage, spans: list[Span]) -> Iterator[None]:
    """Add the time of the block to `spans`, unless it fails."""
    start_s = time.perf_counter()
    yield
    spans.append(Span(stage, start_s, time.perf_counter()))


def since(spans: Iterable[Span], start_s: float) -> list[Span]:
    """What of `spans` came after `start_s`: the part that somebody who joined then has waited for."""
    return [Span(s.stage, max(s.start_s, start_s), s.end_s) for s in spans if s.end_s > start_s]
