"""Mixtures of experts: who is chosen for a row, and what the chosen make of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from card_checks.cases import Case
from card_checks.results import Setting
from dashinfer_vlm.layers import activation


def cases(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Small and odd sizes, or those of Qwen3-VL-30B-A3B: hidden, channels, experts, and how many of them a row has."""
    hidden, inner, num_experts, count = (144, 48, 5, 2) if small else (2048, 768, 128, 8)
    if small:
        yield _choice(setting, dtype, 3, num_experts, count)
    gate_up, down = (
        torch.randn(num_experts, *sides, device=setting.device, dtype=dtype).div_(sides[1] ** 0.5)
        for sides in ((2 * inner, hidden), (hidden, inner))
    )
    for num_rows in (1, 3, 40, 200) if small else (1, 16, 64, 2048):
        yield _mixture(setting, gate_up, down, num_rows, count)


def _choice(setting: Setting, dtype: torch.dtype, num_rows: int, num_experts: int, count: int) -> Case:
    """Of logits of which no two are equal; compared are the shares of all experts."""
    from dashinfer_vlm.kernels.cuda import experts  # triton reads the environment when it is imported

    logits = torch.stack([torch.randperm(num_experts) for _ in range(num_rows)]).to(setting.device, dtype) / 16

    def spread(chosen: Tensor, shares: Tensor) -> Tensor:
        return shares.new_zeros(logits.shape).scatter_(1, chosen.long(), shares)

    def want() -> Tensor:
        shares, chosen = logits.double().softmax(1).topk(count)
        return spread(chosen, shares / shares.sum(1, keepdim=True))

    run = partial(experts.choose, logits, count, normalise=True)
    return Case(f"experts chosen for {num_rows} rows", lambda: spread(*run()), want, logits.nbytes)


def _mixture(setting: Setting, gate_up: Tensor, down: Tensor, num_rows: int, count: int) -> Case:
    """Bound by reading those that anybody chose."""
    from dashinfer_vlm.kernels.cuda import experts  # triton reads the environment when it is imported

    num_experts, hidden, inner = down.shape
    x, residual = (torch.randn(num_rows, hidden, device=setting.device).to(down.dtype) for _ in range(2))
    of_rows, places = torch.randn(num_rows, num_experts).softmax(1).topk(count)
    chosen, shares = places.int().to(setting.device), of_rows.to(setting.device, down.dtype)

    def want() -> Tensor:
        y = residual.double()
        of_all = y.new_zeros(num_rows, num_experts).scatter_(1, chosen.long(), shares.double())
        for share, first, second in zip(of_all.t(), gate_up.double(), down.double(), strict=True):
            y += share[:, None] * F.linear(activation.silu_mul(F.linear(x.double(), first)), second)
        return y

    return Case(
        f"experts of {num_rows} rows",
        partial(experts.multiply, x, gate_up, down, chosen, shares, residual),
        want,
        len(places.unique()) * (gate_up[0].nbytes + down[0].nbytes),
        6 * num_rows * count * hidden * inner,
        bar=1.5,
    )
