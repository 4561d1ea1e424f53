"""Mixtures of experts: a router sends each row to a few of many gated MLPs, and adds up their shares (Shazeer et al.
2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.experts import NativeExperts
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.linear import Linear, Matrix, NativeLinear

__all__ = ["Experts", "ExpertsFactory", "LoopedExperts", "Router", "Routing", "choose", "looped_experts", "with_shared"]


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router's logits become shares."""

    count: int
    """Experts of a row."""
    is_normalised: bool
    """Whether the shares of a row add up to 1; else they are what the softmax over all experts gives."""
    has_shared: bool = False
    """Whether every row takes the last expert, too, by the sigmoid of its logit, which is not among those of the
    others."""


class Experts(Protocol):
    """[T, hidden] -> [T, hidden] of x's dtype: the shares of the experts of each row, added to `residual`, whose memory
    the result has. None for zeros."""

    @property
    def router(self) -> Linear:
        """To the logits [T, experts]."""
        ...

    def __call__(self, x: Tensor, *, residual: Tensor | None) -> Tensor: ...


ExpertsFactory = Callable[[Tensor, Sequence[Matrix], Sequence[Matrix], Routing], Experts]
"""From the router's weight [experts, hidden], and for each expert gates and ups [2 * channels, hidden], and
[hidden, channels]."""


class Router:
    """Logits [T, experts] of x's dtype, by torch: the weight is small, and in few bits it would choose others."""

    def __init__(self, weight: Tensor) -> None:
        """Of the activations' type."""
        self.weight = weight

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        assert residual is None, "nothing is added to logits"
        y = F.linear(x, self.weight)
        return y if out is None else out.copy_(y)


def choose(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """int64 [T, k] experts and their shares [T, k], of the type of the logits [T, experts], by falling share, a shared
    one last. Source: Qwen3_5MoeSparseMoeBlock of `transformers`."""
    if routing.has_shared:
        return with_shared(*choose(logits[:, :-1], replace(routing, has_shared=False)), logits)
    shares, chosen = logits.softmax(1, dtype=torch.float32).topk(routing.count)
    if routing.is_normalised:
        shares /= shares.sum(1, keepdim=True)
    return chosen, shares.to(logits.dtype)


def with_shared(chosen: Tensor, shares: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The last expert in each row, too."""
    last = chosen.new_full((len(logits), 1), logits.shape[1] - 1)
    return torch.cat((chosen, last), dim=1), torch.cat((shares, logits[:, -1:].sigmoid()), dim=1)


class LoopedExperts:
    """See `Experts`: two linear layers for each, one after the other over the rows that chose it. Waits for the
    device."""

    def __init__(self, router: Linear, layers: Sequence[tuple[Linear, Linear]], routing: Routing) -> None:
        self.router = router
        self.layers = layers
        self.routing = routing

    def __call__(self, x: Tensor, *, residual: Tensor | None) -> Tensor:
        chosen, shares = choose(self.router(x), self.routing)
        y = torch.zeros_like(x) if residual is None else residual
        experts, shares = chosen.flatten(), shares.flatten()[:, None]
        pairs = experts.argsort(stable=True)
        sizes = experts.bincount(minlength=len(self.layers)).tolist()
        for (gate_up, down), mine in zip(self.layers, torch.split(pairs, sizes), strict=True):
            if len(mine):
                rows = mine // chosen.shape[1]
                y.index_add_(0, rows, down(gate_up(x[rows])) * shares[mine])
        return y


class _NativeExperts:
    """See `Experts`: all of them in one call of the native kernels."""

    def __init__(self, router: Linear, native: NativeExperts, routing: Routing) -> None:
        self.router = router
        self.native = native
        self.routing = routing

    def __call__(self, x: Tensor, *, residual: Tensor | None) -> Tensor:
        y = torch.zeros_like(x) if residual is None else residual
        self.native.add_to(y, x, *choose(self.router(x), self.routing))
        return y


def looped_experts(
    make_linear: Callable[[Matrix, Tensor | None, Epilogue], Linear],
    router: Tensor,
    gate_ups: Sequence[Matrix],
    downs: Sequence[Matrix],
    routing: Routing,
) -> Experts:
    """A layer for each matrix, in one call where all of them are the native kernels', of which the router is one more,
    in float32."""
    layers = [
        (make_linear(gate_up, None, "silu_mul"), make_linear(down, None, "none"))
        for gate_up, down in zip(gate_ups, downs, strict=True)
    ]
    packed = [(a.packed, b.packed) for a, b in layers if isinstance(a, NativeLinear) and isinstance(b, NativeLinear)]
    if len(packed) == len(layers):
        whole_router = NativeLinear(cpu_ops.pack_linear(router), None, "none")
        return _NativeExperts(whole_router, NativeExperts(packed), routing)
    return LoopedExperts(Router(router), layers, routing)
