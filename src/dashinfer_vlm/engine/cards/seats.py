"""A running sequence has a seat: its row in all that is kept from step to step, on the host and on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashinfer_vlm.engine.cards.staging import SAMPLING
from dashinfer_vlm.engine.sampler import LEAST_TEMPERATURE
from dashinfer_vlm.engine.sequence import Sequence
from dashinfer_vlm.engine.steps import Chunk


@dataclass(slots=True, eq=False)
class Seat:
    index: int
    sequence: Sequence
    blocks: list[int]
    """The sequence's own list: another one means that it was preempted meanwhile and has other blocks."""
    num_listed: int = 0
    """Blocks that are in the table."""
    next_start: int = 0
    """Where its last chunk that was started ended. Blocks in front of it are the table's for good; those behind it may
    be replaced by ones that others have computed, which moves the next chunk's start."""
    is_counted: bool = False
    """Whether the device knows what its sequence has seen."""


class Seats:
    """Who sits where, and the host's rows."""

    def __init__(self, num_seats: int, max_blocks: int) -> None:
        self.nobody = num_seats
        """One more seat on the device: what no sequence is to get goes there."""
        self.tables = np.zeros((num_seats, max_blocks), np.int32)
        self.position_offsets = np.zeros(num_seats, np.int64)
        self.columns: dict[str, NDArray[Any]] = {name: np.zeros(num_seats, kind) for name, kind in SAMPLING.items()}
        self._seats: dict[Sequence, Seat] = {}
        self._free = list(range(num_seats))[::-1]

    def take(self, chunk: Chunk, block_size: int) -> Seat:
        """The seat of the chunk's sequence, with its blocks in the table."""
        sequence = chunk.sequence
        seat = self._seats.get(sequence)
        if seat is None:
            seat = self._seats[sequence] = self._seat(sequence)
        elif seat.blocks is not sequence.blocks:
            seat.blocks, seat.next_start, seat.num_listed = sequence.blocks, 0, 0
        if len(seat.blocks) != seat.num_listed or chunk.start != seat.next_start:
            first = seat.next_start // block_size
            self.tables[seat.index, first : len(seat.blocks)] = seat.blocks[first:]
            seat.num_listed = len(seat.blocks)
        return seat

    @staticmethod
    def started(chunks: Iterable[Chunk], seated: Iterable[Seat]) -> None:
        """Their step is under way; one that has failed on its way there leaves the seats as they were."""
        for chunk, seat in zip(chunks, seated, strict=True):
            seat.next_start = chunk.start + chunk.num_tokens

    def _seat(self, sequence: Sequence) -> Seat:
        if not self._free:
            for preempted in [other for other in self._seats if not other.blocks]:
                self.leave(preempted)
        seat = Seat(self._free.pop(), sequence, sequence.blocks)
        params = sequence.request.params
        self.position_offsets[seat.index] = sequence.position_offset
        for name, column in self.columns.items():
            column[seat.index] = getattr(params, name)
        if params.temperature:
            self.columns["temperature"][seat.index] = max(params.temperature, LEAST_TEMPERATURE)
        return seat

    def leave(self, sequence: Sequence) -> None:
        """Its seat is free, if it has one. What is under way for it ends before anything that is started for the next
        owner."""
        if (seat := self._seats.pop(sequence, None)) is not None:
            self._free.append(seat.index)
