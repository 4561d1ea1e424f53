"""The vision encoder, whole on every rank: the pictures of a batch are dealt out, whole ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dashinfer_vlm.engine.parallel.crew import RankProcesses
from dashinfer_vlm.models.base import EncoderState, VisionEncoder
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid

__all__ = ["DealtEncoder", "deal"]


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices for each rank: the largest first, each to who has least. The first rank has the very largest."""
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = loads.index(min(loads))
        hands[rank].append(index)
        loads[rank] += sizes[index]
    return hands


@dataclass(slots=True)
class DealtState:
    own: EncoderState
    hands: list[list[int]]
    grids: Sequence[Grid]

    @property
    def done(self) -> bool:
        return self.own.done


class DealtEncoder:
    """A `models.base.VisionEncoder` on the first rank. The others do as many slices as it does, and what they are
    behind in `finish`."""

    def __init__(self, model: LoadedModel, processes: RankProcesses) -> None:
        assert model.encoder is not None, "a text model encodes nothing"
        self._own: VisionEncoder = model.encoder
        self._model = model
        self._processes = processes

    @property
    def bytes_per_patch(self) -> int:
        return self._own.bytes_per_patch

    def begin(self, patches: Sequence[Tensor], grids: Sequence[Grid]) -> DealtState:
        hands = deal([len(item) for item in patches], self._model.ranks.count)
        given = {i: patches[i].to(self._model.device).contiguous() for hand in hands[1:] for i in hand}
        for rank in self._others(hands):  # which wait for what they are told of: nothing may fail from here on
            self._processes.begin_encoding(rank, [grids[i] for i in hands[rank]])
            for i in hands[rank]:
                self._model.ranks.send(given[i], rank)
        own = self._own.begin([patches[i] for i in hands[0]], [grids[i] for i in hands[0]])
        return DealtState(own, hands, grids)

    def run(self, state: Any, num_slices: int) -> None:
        assert isinstance(state, DealtState)
        for rank in self._others(state.hands):
            self._processes.encode_slices(rank, num_slices)
        self._own.run(state.own, num_slices)

    def finish(self, state: Any) -> list[Tensor]:
        """Whatever goes wrong with its own pictures, it takes those that the others send: they wait for that."""
        assert isinstance(state, DealtState)
        others = [(rank, i) for rank in self._others(state.hands) for i in state.hands[rank]]
        found = {i: self._place_for(state.grids[i]) for _, i in others}
        for rank in self._others(state.hands):
            self._processes.finish_encoding(rank)
        try:
            found |= dict(zip(state.hands[0], self._own.finish(state.own), strict=True))
        finally:
            for rank, i in others:
                self._model.ranks.receive(found[i], rank)
        return [found[i] for i in range(len(state.grids))]

    def _place_for(self, grid: Grid) -> Tensor:
        num_tokens = math.prod(grid) // self._model.config.merge_size**2
        shape = num_tokens, self._model.embedding_size
        return torch.empty(shape, dtype=self._model.activation_dtype, device=self._model.device)

    def _others(self, hands: list[list[int]]) -> list[int]:
        """Those that have got something."""
        return [rank for rank in range(1, len(hands)) if hands[rank]]
