"""What a step tells the device, in one copy: arrays one behind the other in a buffer that never moves.

A step is padded up to a `Shape`, for which the arrays always lie in the same places. Padding is rows that no sequence
owns: they compute something that nobody reads, and write it where nobody looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dashinfer_vlm.layers.marks import mark

Arrays = dict[str, NDArray[Any]]

NUM_REMEMBERED = 256
"""Shapes whose arrays are not made anew in each step."""
_ALIGNED = 256
"""Bytes. Arrays begin at multiples of it, as tensors of their own would."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step is padded up to."""

    num_rows: int
    num_sequences: int
    """As many as rows: each owns one at most, which is what attention takes for decode. Otherwise another number."""
    num_logits: int
    has_items: bool

    def fits(self, num_rows: int, num_sequences: int, num_logits: int) -> bool:
        return num_rows <= self.num_rows and num_sequences <= self.num_sequences and num_logits <= self.num_logits


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each array of a shape begins, and what it holds."""

    places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]
    num_bytes: int

    def host(self, flat: NDArray[np.uint8]) -> Arrays:
        return {
            name: flat[start : start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (start, dtype, shape) in self.places.items()
        }

    def device(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat[start : start + prod(shape) * dtype.itemsize].view(_TORCH[dtype.name]).view(shape)
            for name, (start, dtype, shape) in self.places.items()
        }


_TORCH = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32, "bool": torch.bool}


@cache
def layout_of(shape: Shape) -> Layout:
    """Block tables are behind everything else, as wide as the step needs, so that a step of short texts copies
    little."""
    rows, sequences, logits = shape.num_rows, shape.num_sequences, shape.num_logits
    arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
        "ids": (np.int64, (rows,)),
        "source": (np.int64, (rows,)),  # the seat whose newest token is the row's id, -1: it is in `ids`
        "positions": (np.int64, (3, rows)),
        "slots": (np.int64, (rows,)),
        "is_item": (np.bool_, (rows,)),
        "query_starts": (np.int32, (sequences + 1,)),
        "context_lens": (np.int32, (sequences,)),
        "state_seats": (np.int64, (sequences,)),  # where the states of each sequence lie, if the model has some
        "logits_rows": (np.int64, (logits,)),
        "seats": (np.int64, (logits,)),  # who gets the token of each logits row; the seat behind all others: nobody
        "counted_rows": (np.int64, (logits,)),  # of the logits, whose seen tokens the device counts, and their seats
        "counted_seats": (np.int64, (logits,)),
        "uniform": (np.float32, (logits,)),
        **{name: (kind, (logits,)) for name, kind in SAMPLING.items()},
    }
    places, end = {}, 0
    for name, (kind, size) in arrays.items():
        dtype = np.dtype(kind)
        places[name] = (end, dtype, size)
        end += -(-prod(size) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return Layout(places, end)


SAMPLING: dict[str, Any] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
}
"""Columns of `Choices` that a sequence's parameters give once and for all."""
COLUMNS = ("uniform", *SAMPLING)
"""Columns of `Choices`."""
OF_LOGITS = ("seats", "counted_rows", "counted_seats", *COLUMNS)
"""Arrays with a place for each row of logits that sampling wants."""


class Staging:
    """Two pinned buffers in turns, and the static one that each is copied to."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_card = device.type == "cuda"
        self._turns = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_card) for _ in range(2)]
        self._sent = [mark(device) for _ in self._turns]
        self._turn = 0
        self.static = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._arrays = [lru_cache(NUM_REMEMBERED)(partial(_arrays, turn.numpy())) for turn in self._turns]
        self._tensors = lru_cache(NUM_REMEMBERED)(partial(_tensors, self.static))

    def arrays(self, shape: Shape) -> Arrays:
        """In the buffer that `next` has given."""
        return self._arrays[self._turn](shape)

    def tensors(self, shape: Shape) -> dict[str, Tensor]:
        """In the static buffer."""
        return self._tensors(shape)

    def next(self) -> NDArray[np.uint8]:
        """The buffer to fill for the next step, once the step before the last one has been copied from it."""
        self._turn ^= 1
        self._sent[self._turn].wait()
        flat: NDArray[np.uint8] = self._turns[self._turn].numpy()
        return flat

    def send(self, num_bytes: int) -> None:
        """Copy what was filled, behind all that the device has been given before."""
        self.static[:num_bytes].copy_(self._turns[self._turn][:num_bytes], non_blocking=True)
        self._sent[self._turn] = mark(self.static.device)


def _arrays(flat: NDArray[np.uint8], shape: Shape) -> Arrays:
    return layout_of(shape).host(flat)


def _tensors(flat: Tensor, shape: Shape) -> dict[str, Tensor]:
    return layout_of(shape).device(flat)
