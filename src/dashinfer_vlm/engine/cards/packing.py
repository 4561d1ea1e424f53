"""Writes a plan into the arrays of a shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dashinfer_vlm.engine.cards.seats import Seat, Seats
from dashinfer_vlm.engine.cards.staging import SAMPLING, Arrays, Shape
from dashinfer_vlm.engine.runner import rows_of_logits, write_rows
from dashinfer_vlm.engine.sequence import PENDING
from dashinfer_vlm.engine.steps import Chunk
from dashinfer_vlm.layers.sampling import uniform


@dataclass(frozen=True, slots=True)
class Spare:
    """Where padding writes its keys and values: a block behind the pool."""

    first_slot: int
    block_size: int

    def slots(self, count: int) -> np.ndarray:
        return self.first_slot + np.arange(count) % self.block_size


def place_of(chunk: Chunk) -> int:
    """Of the token that its first logits give, in the output of its sequence."""
    return chunk.start + chunk.num_tokens - chunk.sequence.num_prompt


def pack_rows(chunks: tuple[Chunk, ...], seated: list[Seat], seats: Seats, spare: Spare, arrays: Arrays) -> None:
    """All that the model call needs, but for block tables and items. Rows behind those of the chunks are nobody's."""
    starts = [0, *accumulate([chunk.num_rows for chunk in chunks])]
    _pad(arrays, starts[-1], len(chunks), spare)
    arrays["query_starts"][: len(starts)] = starts
    arrays["context_lens"][: len(chunks)] = [chunk.start + chunk.num_rows for chunk in chunks]
    arrays["state_seats"][: len(chunks)] = [chunk.sequence.seat for chunk in chunks]
    decode = [i for i, chunk in enumerate(chunks) if chunk.num_rows == 1 and chunk.sequence.num_prompt <= chunk.start]
    if len(decode) == len(chunks):
        _pack_decode(chunks, slice(len(chunks)), seated, seats, spare.block_size, arrays)
    else:
        at = np.array([starts[i] for i in decode], np.int64)
        _pack_decode([chunks[i] for i in decode], at, [seated[i] for i in decode], seats, spare.block_size, arrays)
    for i in set(range(len(chunks))).difference(decode):
        rows = slice(starts[i], starts[i + 1])
        write_rows(
            chunks[i], spare.block_size, arrays["ids"][rows], arrays["slots"][rows], arrays["positions"][:, rows]
        )
    wanted = rows_of_logits(chunks, starts)
    arrays["logits_rows"][: len(wanted)] = wanted


def _pad(arrays: Arrays, num_rows: int, num_sequences: int, spare: Spare) -> None:
    arrays["source"][:] = -1
    arrays["is_item"][:] = False
    if num_rows < len(arrays["ids"]):
        arrays["ids"][num_rows:] = 0
        arrays["positions"][:, num_rows:] = 0
        arrays["slots"][num_rows:] = spare.slots(len(arrays["slots"]) - num_rows)
    arrays["query_starts"][num_sequences:] = num_rows
    arrays["context_lens"][num_sequences:] = 0
    arrays["state_seats"][num_sequences:] = 0  # where nobody looks: they have no rows
    arrays["logits_rows"][:] = 0


def _pack_decode(
    chunks: Iterable[Chunk],
    at: slice | NDArray[np.int64],
    seated: list[Seat],
    seats: Seats,
    block_size: int,
    arrays: Arrays,
) -> None:
    """One row each, `at` those rows, behind its prompt: the step that everybody waits for, without a loop over
    arrays."""
    index = np.array([seat.index for seat in seated], np.int64)
    ids = np.array([chunk.sequence.tokens[chunk.start] for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    is_pending = ids == PENDING
    arrays["ids"][at] = np.where(is_pending, 0, ids)
    arrays["source"][at] = np.where(is_pending, index, -1)
    arrays["slots"][at] = seats.tables[index, starts // block_size] * np.int64(block_size) + starts % block_size
    arrays["positions"][:, at] = starts + seats.position_offsets[index]


def pack_sampling(chunks: list[Chunk], seated: list[Seat], seats: Seats, arrays: Arrays) -> int:
    """What sampling needs of sequences that end in wanted rows; their number of rows. A chunk with guesses leaves no
    newest token: nothing of its sequence is started before its tokens are known."""
    rows = [(chunk, seat, i) for chunk, seat in zip(chunks, seated, strict=True) for i in range(chunk.num_logits)]
    index = np.array([seat.index for _, seat, _ in rows], np.int64)
    arrays["seats"][: len(index)] = [seats.nobody if chunk.draft else seat.index for chunk, seat, _ in rows]
    for name in SAMPLING:
        arrays[name][: len(index)] = seats.columns[name][index]
    places = [place_of(chunk) + i for chunk, _, i in rows]
    arrays["uniform"][: len(index)] = uniform([chunk.sequence.seed for chunk, _, _ in rows], places)
    return len(index)


def empty(shape: Shape, spare: Spare, arrays: Arrays) -> None:
    """A step of the shape in which all rows are nobody's."""
    assert len(arrays["ids"]) == shape.num_rows
    _pad(arrays, 0, 0, spare)
