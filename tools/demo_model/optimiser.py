"""Muon for the weight matrices of the blocks, AdamW for everything else: fewer pictures for the same loss than AdamW
alone.

Muon (Jordan et al., 2024): the momentum of a matrix is replaced by its nearest half-orthogonal matrix, by Newton-Schulz
steps.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalised(stack: Tensor, steps: int = 4) -> Tensor:
    """Matrices [N, r, c] with singular values drawn to about one."""
    x: Tensor = stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Optimiser:
    """One step over both groups; `scale` in 0..1 is the schedule's share of the peak rates."""

    def __init__(
        self, parameters: list[tuple[str, nn.Parameter, float]], matrix_rate: float = 0.01, other_rate: float = 1e-3
    ) -> None:
        """`parameters` by name, each with its share of the rates; one without a gradient is left alone in that step."""
        self.matrices: list[tuple[nn.Parameter, Tensor, float]] = []
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, value, share in parameters:
            if value.ndim == 2 and "blocks." in name:
                self.matrices.append((value, torch.zeros_like(value), share))
            else:
                groups[share].append(value)
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        self.adam = torch.optim.AdamW(
            [{"params": values, "lr": other_rate * share, "share": share} for share, values in groups.items()],
            lr=other_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            foreach=True,
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = self.other_rate * scale * group["share"]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        shelves: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for value, momentum, share in self.matrices:
            if value.grad is None:
                continue
            momentum.mul_(0.95).add_(value.grad)
            update = value.grad + 0.95 * momentum
            parts = 3 if value.shape[0] == 3 * value.shape[1] else 1  # a fused qkv is three matrices
            for part, piece in zip(update.chunk(parts), value.chunk(parts), strict=True):
                shelves[tuple(part.shape)].append((part, piece, share))
            value.grad = None
        for (rows, columns), shelf in shelves.items():
            updates = orthogonalised(torch.stack([part for part, _, _ in shelf]))
            size = max(1.0, rows / columns) ** 0.5
            for (_, piece, share), change in zip(shelf, updates, strict=True):
                rate = self.matrix_rate * scale * share
                piece.mul_(1 - rate * 0.02).sub_(change, alpha=rate * size)

    def state(self) -> dict[str, object]:
        return {"momenta": [momentum for _, momentum, _ in self.matrices], "adam": self.adam.state_dict()}

    def load(self, state: dict[str, object]) -> None:
        for (_, mine, _), theirs in zip(self.matrices, state["momenta"], strict=True):  # type: ignore[call-overload]
            mine.copy_(theirs)
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
