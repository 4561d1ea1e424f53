"""The model calls of a card: buffers that never move, and graphs over them. It knows shapes and bytes, no sequences, so
that every rank of a shared model can do what the first one does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.cards.graphs import Graphs, Shapes
from dashinfer_vlm.engine.cards.packing import Spare, empty
from dashinfer_vlm.engine.cards.staging import NUM_REMEMBERED, OF_LOGITS, Shape, Staging, layout_of
from dashinfer_vlm.engine.memory import most_running
from dashinfer_vlm.models.base import KVCache, Model, StagedRows, StepBatch
from dashinfer_vlm.models.settings import resolve_max_model_len

__all__ = ["Call", "Followers", "ModelCalls"]

_TABLE_ENTRY = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Call:
    """One model call over what was staged: the arrays of a shape, and behind them block tables as wide as they are."""

    shape: Shape
    num_seated: int
    width: int
    has_items: bool
    """Whether rows of pictures are put in."""
    copies: tuple[tuple[int, int], ...] = ()
    """Of states before it (`ModelCalls.copy_states`)."""
    first_vector: int | None = None
    """Of the wanted rows, from which on they give vectors in place of logits; None: none does."""

    @property
    def num_bytes(self) -> int:
        return layout_of(self.shape).num_bytes + self.num_seated * self.width * _TABLE_ENTRY.itemsize

    def tables(self, flat: NDArray[np.uint8]) -> NDArray[Any]:
        """int32 [seated, width] in the staged bytes."""
        start = layout_of(self.shape).num_bytes
        return flat[start : self.num_bytes].view(_TABLE_ENTRY).reshape(self.num_seated, self.width)


class Followers(Protocol):
    """The other ranks, told by the first."""

    def call(self, call: Call, flat: NDArray[np.uint8]) -> None:
        """Make the same call over a copy of these bytes. Raises EngineDeadError when one of them has ended."""
        ...

    def check(self, *, patience_s: float = 0.0) -> None:
        """Raise EngineDeadError when one of them has ended, or does so within `patience_s`."""
        ...

    def close(self) -> None:
        """End them; idempotent."""
        ...


class ModelCalls:
    """Owns all that a replayed graph reads or writes. The last block of the cache is for padding."""

    def __init__(self, model: Model, kv: KVCache, config: EngineConfig, shapes: Shapes) -> None:
        self.model = model
        self.shapes = shapes
        self.kv = KVCache([keys[:-1] for keys in kv.keys], [values[:-1] for values in kv.values], kv.states)
        """Without the last block."""
        self.all_kv = kv
        self.num_seats = most_running(self.kv, config)
        self.spare = Spare(self.kv.num_blocks * kv.block_size, kv.block_size)
        max_len = resolve_max_model_len(model.text.max_position_embeddings, config)
        self.max_blocks = min(-(-max_len // kv.block_size) + 1, self.kv.num_blocks)
        self.newest = torch.zeros(self.num_seats + 1, dtype=torch.int64, device=model.device)
        """The newest token of each seat. The seat behind all others is nobody's."""
        self._make_buffers()
        self.graphs = Graphs(self._run_into_logits, model.device)

    def _make_buffers(self) -> None:
        """Nothing here moves or grows: graphs read and write it where it is now."""
        largest, device = self.shapes.largest, self.model.device
        num_bytes = Call(largest, largest.num_sequences, self.max_blocks, has_items=True).num_bytes
        self.staging = Staging(num_bytes, device)
        self._asked = lru_cache(NUM_REMEMBERED)(partial(_asked, self.staging))
        self.tables = torch.zeros(largest.num_sequences, self.max_blocks, dtype=torch.int32, device=device)
        embedding = (largest.num_rows, self.model.embedding_size)
        self.items = torch.zeros(embedding, dtype=self.model.activation_dtype, device=device)
        num_logits = max((shape.num_logits for shape in self.shapes.all()), default=0)
        self.captured_logits = torch.zeros(num_logits, self.model.text.vocab_size, device=device)

    @torch.inference_mode()
    def capture(self) -> None:
        """Make a graph of every shape; calls of others are started kernel by kernel."""
        self.graphs.capture(self.shapes.all(), self._send_empty)

    def copy_states(self, copies: Iterable[tuple[int, int]]) -> None:
        """From which seat, to which, in this order."""
        for source, target in copies:
            self.kv.copy_state(source, target)

    def send(self, call: Call) -> None:
        """One copy of what was staged; block tables are put where the model call looks for them."""
        self.staging.send(call.num_bytes)
        start, shape = layout_of(call.shape).num_bytes, (call.num_seated, call.width)
        sent = self.staging.static[start : call.num_bytes].view(torch.int32).view(shape)
        self.tables[: call.num_seated, : call.width] = sent

    def put_items(self, call: Call, items: Iterable[tuple[int, Tensor]]) -> None:
        """Rows of pictures, and where they begin; the first rank has them, and all get them."""
        for start, rows in items:
            self.items[start : start + len(rows), : rows.shape[1]] = rows
            self.items[start : start + len(rows), rows.shape[1] :] = 0
        if call.has_items:
            self.model.ranks.broadcast(self.items[: call.shape.num_rows])

    def asked(self, shape: Shape, num_rows: int) -> dict[str, Tensor]:
        """What was sent of the first rows of logits, on the device."""
        return self._asked(shape, num_rows)

    def make(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """float32 logits, whose first rows are the wanted ones, and vectors, likewise, if any are wanted; a call for
        those is started kernel by kernel."""
        if call.first_vector is not None:
            return self.model.forward_with_vectors(self._batch(call.shape), self.all_kv, call.first_vector)
        if call.shape not in self.graphs:
            return self._run(call.shape), None
        self.graphs.replay(call.shape)
        return self.captured_logits, None

    def _send_empty(self, shape: Shape) -> None:
        self.staging.next()
        empty(shape, self.spare, self.staging.arrays(shape))
        self.send(Call(shape, 0, 0, has_items=False))

    def _run_into_logits(self, shape: Shape) -> None:
        self.captured_logits[: shape.num_logits] = self._run(shape)

    def _run(self, shape: Shape) -> Tensor:
        """The model call over what was sent; float32 [num_logits, vocab]."""
        return self.model.forward(self._batch(shape), self.all_kv)

    def _batch(self, shape: Shape) -> StepBatch:
        """What was sent, and the newest tokens, which the first rank has."""
        self.model.ranks.broadcast(self.newest)
        arrays = self.staging.tensors(shape)
        source = arrays["source"]
        newest = self.newest[source.clamp(min=0)]
        return StepBatch(
            ids=torch.where(source < 0, arrays["ids"], newest),
            positions=arrays["positions"],
            slots=arrays["slots"],
            query_starts=arrays["query_starts"],
            context_lens=arrays["context_lens"],
            block_tables=self.tables[: shape.num_sequences],
            logits_rows=arrays["logits_rows"],
            seats=arrays["state_seats"],
            staged=StagedRows(self.items[: shape.num_rows], arrays["is_item"]) if shape.has_items else None,
        )


def _asked(staging: Staging, shape: Shape, num_rows: int) -> dict[str, Tensor]:
    arrays = staging.tensors(shape)
    return {name: arrays[name][:num_rows] for name in OF_LOGITS}
