"""The processes that share one text model: which part of a matrix is whose, and how what they compute is put together.

Attention and MLP are split by columns first and by rows behind (Megatron-LM, Shoeybi et al. 2019), so that each sums
once over the ranks; the head is split by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.layers.linear import Linear

__all__ = ["ALONE", "WHOLE", "Cut", "JoinedLinear", "Ranks", "SummedLinear", "times"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """All calls that move tensors are made by all ranks, in one order; they belong to torch's default group."""

    index: int = 0
    count: int = 1

    @property
    def are_several(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.count > 1

    def share(self, count: int, of: str, *, may_repeat: bool = False) -> slice:
        """Which of `count` equal things in a row are this rank's. With `may_repeat`, fewer things than ranks are held
        by several. Raises ConfigError for a number that cannot be shared, which `of` names."""
        if count % self.count == 0:
            each = count // self.count
            return slice(self.index * each, (self.index + 1) * each)
        if may_repeat and self.count % count == 0:
            first = self.index * count // self.count
            return slice(first, first + 1)
        raise ConfigError(f"--parallel-size {self.count} does not divide the model's {count} {of}")

    def sum(self, x: Tensor) -> Tensor:
        """x, with what all ranks have there added up, in place."""
        if self.are_several:
            distributed.all_reduce(x)
        return x

    def join_columns(self, x: Tensor) -> Tensor:
        """[T, N] of every rank, as [T, ranks * N]."""
        if not self.are_several:
            return x
        num_rows, width = x.shape
        parts = torch.empty(self.count, num_rows, width, dtype=x.dtype, device=x.device)
        distributed.all_gather(list(parts), x.contiguous())
        return parts.transpose(0, 1).reshape(num_rows, self.count * width)

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's x, in place."""
        if self.are_several:
            distributed.broadcast(x, 0)

    def send(self, x: Tensor, to: int) -> None:
        distributed.send(x, to)

    def receive(self, x: Tensor, origin: int) -> None:
        """In place."""
        distributed.recv(x, origin)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of what all ranks say."""
        if not self.are_several:
            return number
        told = torch.tensor([number], dtype=torch.int64, device=device)
        distributed.all_reduce(told, distributed.ReduceOp.MIN)
        return int(told)


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of joined matrices that one rank holds."""

    rows: Mapping[str, slice | tuple[slice, ...]] = field(default_factory=dict)
    """Of matrices by name, one part or several; all rows of those that are not named."""
    columns: slice = field(default_factory=lambda: slice(None))

    def of(self, names: Iterable[str]) -> list[tuple[slice, ...]]:
        """The rows of each, in parts."""
        found = (self.rows.get(name, slice(None)) for name in names)
        return [(parts,) if isinstance(parts, slice) else parts for parts in found]


WHOLE = Cut()


def times(part: slice, size: int) -> slice:
    """The same part of a row, counted in things of which `size` make one."""
    return slice(part.start * size, part.stop * size)


class SummedLinear:
    """The layer behind one that was split: each rank multiplies its columns, and all sum what comes of it. The first
    one adds bias and residual, so that they count once."""

    def __init__(self, part: Linear, ranks: Ranks) -> None:
        self.part = part
        self.ranks = ranks

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return self.ranks.sum(self.part(x, residual=residual if self.ranks.index == 0 else None, out=out))


class JoinedLinear:
    """A layer whose outputs are dealt out, where all ranks want all of them."""

    def __init__(self, part: Linear, ranks: Ranks) -> None:
        self.part = part
        self.ranks = ranks

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        assert residual is None, "nothing is added to what is joined"
        y = self.ranks.join_columns(self.part(x))
        return y if out is None else out.copy_(y)
