"""Steps of layers with states, and what comes of them one token after the other, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

NUM_SEATS = 6

Where = tuple[Tensor, Tensor, Tensor]
"""Seats, query starts and context lengths."""


def step(lengths: Sequence[int], befores: Sequence[int]) -> Where:
    """Sequences of `lengths` rows with `befores` tokens in front of them, in seats of no order."""
    seats = torch.tensor([4, 1, 5, 0, 3][: len(lengths)])
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    contexts = [length + before for length, before in zip(lengths, befores, strict=True)]
    return seats, starts, torch.tensor(contexts, dtype=torch.int32)


STEPS = {
    "decode": step([1], [9]),
    "the first token": step([1], [0]),
    "streams": step([1, 1, 1, 1], [5, 0, 70, 1]),
    "a prompt": step([133], [0]),
    "prompts beside streams": step([1, 66, 1, 5, 64], [3, 0, 64, 7, 0]),
    "chunks of prompts": step([2, 2, 65], [64, 0, 3]),
}


def with_owners(kept: Tensor, where: Where) -> Tensor:
    """The same, NaN where nobody has a state: in other seats, and in those of who begins."""
    seats, starts, contexts = where
    owned = torch.full_like(kept, torch.nan)
    old = seats[contexts > starts.diff()]
    owned[old] = kept[old]
    return owned


@dataclass(frozen=True)
class Rule:
    """What the delta rule is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor
    memory: Tensor
    where: Where

    @classmethod
    def random(
        cls, where: Where, *, speed: float = 0.1, heads: tuple[int, int] = (2, 6), dims: tuple[int, int] = (16, 24)
    ) -> Rule:
        """The larger `speed`, the sooner all is forgotten. q, k and v are views of joined rows."""
        torch.manual_seed(0)
        num_tokens, (num_keys, num_values), (key_dim, value_dim) = int(where[1][-1]), heads, dims
        joined = torch.randn(num_tokens, 2 * num_keys * key_dim + num_values * value_dim + 3)
        widths = [num_keys * key_dim, num_keys * key_dim, num_values * value_dim, 3]
        q, k, v, _ = joined.split_with_sizes(widths, dim=1)
        return cls(
            q=q.view(num_tokens, num_keys, key_dim),
            k=k.view(num_tokens, num_keys, key_dim),
            v=v.view(num_tokens, num_values, value_dim),
            beta=torch.rand(num_tokens, num_values),
            decay=-speed * torch.rand(num_tokens, num_values),
            memory=with_owners(torch.randn(NUM_SEATS, num_values, key_dim, value_dim), where),
            where=where,
        )

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.beta, self.decay, self.memory, *self.where)

    def copy(self) -> Rule:
        """With a memory of its own."""
        return replace(self, memory=self.memory.clone())

    def rows(self, start: int, stop: int) -> Rule:
        """Some tokens of the only sequence, whose first one is the first row."""
        names = ("q", "k", "v", "beta", "decay")
        part = {name: getattr(self, name)[start:stop] for name in names}
        return replace(self, **part, where=step([stop - start], [start]))

    def one_by_one(self) -> tuple[Tensor, Tensor]:
        """By the definition, in float64: what is read, and all memories afterwards."""
        group = self.v.shape[1] // self.k.shape[1]
        q, k = (x.double().repeat_interleave(group, dim=1) for x in (self.q, self.k))
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        v, beta, keep = self.v.double(), self.beta.double()[..., None], self.decay.double().exp()[..., None, None]
        read, memory = torch.empty_like(v), self.memory.double()
        for seat, (start, stop), context in zip(
            self.where[0].tolist(), _bounds(self.where), self.where[2], strict=True
        ):
            if context == stop - start:
                memory[seat] = 0
            for t in range(start, stop):
                kept = memory[seat] * keep[t]
                change = beta[t] * (v[t] - torch.einsum("hkv,hk->hv", kept, k[t]))
                memory[seat] = kept + torch.einsum("hk,hv->hkv", k[t], change)
                read[t] = torch.einsum("hkv,hk->hv", memory[seat], q[t]) / self.q.shape[-1] ** 0.5
        return read, memory


@dataclass(frozen=True)
class Conv:
    """What the convolution is given."""

    x: Tensor
    inputs: Tensor
    weight: Tensor
    where: Where

    @classmethod
    def random(cls, where: Where, *, num_channels: int = 50, size: int = 4) -> Conv:
        torch.manual_seed(1)
        inputs = with_owners(torch.randn(NUM_SEATS, size - 1, num_channels), where)
        x = torch.randn(int(where[1][-1]), num_channels + 5)[:, 2:-3]
        return cls(x, inputs, torch.randn(size, num_channels), where)

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.x, self.inputs, self.weight, *self.where)

    def copy(self) -> Conv:
        """With inputs of its own."""
        return replace(self, inputs=self.inputs.clone())

    def one_by_one(self) -> tuple[Tensor, Tensor]:
        """In float64: the sums after SiLU, and all inputs afterwards."""
        y, inputs = torch.empty(self.x.shape, dtype=torch.float64), self.inputs.clone()
        for seat, (start, stop), context in zip(
            self.where[0].tolist(), _bounds(self.where), self.where[2], strict=True
        ):
            before = torch.zeros_like(inputs[seat]) if context == stop - start else inputs[seat]
            padded, size = torch.cat((before, self.x[start:stop])), len(self.weight)
            inputs[seat] = padded[stop - start :]
            for t in range(stop - start):
                total = (padded[t : t + size].double() * self.weight.double()).sum(0)
                y[start + t] = total * total.sigmoid()
        return y, inputs


def _bounds(where: Where) -> list[tuple[int, int]]:
    return list(pairwise(where[1].tolist()))
