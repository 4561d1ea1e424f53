"""Mixtures of experts: who is chosen for a row, and what the chosen make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as each
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from card_checks.cases import BFLOAT16_ERROR, Case
from card_checks.results import Setting
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers import activation, fp8, grouped

if TYPE_CHECKING:  # triton reads the environment when it is imported
    from dashinfer_vlm.kernels.cuda.experts_floats import Stack


@dataclass(frozen=True, slots=True)
class _Experts:
    """Weights of one kind, and what they stand for."""

    name: str
    multiply: Callable[..., Tensor]
    """See `kernels.cuda.experts.multiply`; its weights are given."""
    hidden: int
    inner: int
    wide: Callable[[int], tuple[Tensor, Tensor]]
    """float64 of one expert: gates and ups, and `down`."""
    num_bytes: int
    """Of one expert."""
    taken: Callable[[Tensor], Tensor] = Tensor.double
    """float64 of rows as tiles take them."""
    flops: float = 1
    """Of a product, as against one of 16 bits."""
    allowed: float = 0
    """Error of tiles."""


def cases(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Small and odd sizes, or those of Qwen3-VL-30B-A3B: hidden, channels, experts, and how many of them a row has."""
    hidden, inner, num_experts, count = (144, 48, 5, 2) if small else (2048, 768, 128, 8)
    if small:
        yield _choice(setting, dtype, 3, num_experts, count)
    kinds = [_whole(setting, dtype, hidden, inner, num_experts)]
    if setting.multiplies_floats_of_8_bits:
        kinds += [
            _floats(setting, dtype, hidden, 128 if small and blocks else inner, num_experts, blocks=blocks)
            for blocks in (False, True)
        ]
    kinds += [_few(setting, dtype, hidden, inner, num_experts, bits) for bits in (8, 4)]
    kinds.append(_few(setting, dtype, hidden, inner, num_experts, 4, has_zeros=True))
    for experts, num_rows in each(kinds, (1, 3, 40, 200) if small else (1, 16, 64, 2048)):
        yield _mixture(setting, dtype, experts, num_experts, num_rows, count)


def of_published_size(setting: Setting, counts: Sequence[int]) -> Iterator[Case]:
    """So many rows in each quantised kind of weights: programs run side by side there."""
    yield from in_blocks(setting, counts)
    for bits in (8, 4):
        yield from in_few_bits(setting, bits, counts)


def in_blocks(setting: Setting, counts: Iterable[int]) -> Iterator[Case]:
    """So many rows by 8-bit floats of published size."""
    if setting.multiplies_floats_of_8_bits:
        experts = _floats(setting, torch.bfloat16, 2048, 768, 128, blocks=True)
        for num_rows in counts:
            yield _mixture(setting, torch.bfloat16, experts, 128, num_rows, 8)


def in_few_bits(setting: Setting, bits: int, counts: Iterable[int]) -> Iterator[Case]:
    """The same in 8 or 4 bits."""
    experts = _few(setting, torch.bfloat16, 2048, 768, 128, bits)
    for num_rows in counts:
        yield _mixture(setting, torch.bfloat16, experts, 128, num_rows, 8)


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


def _whole(setting: Setting, dtype: torch.dtype, hidden: int, inner: int, num_experts: int) -> _Experts:
    """16 bits, or 32."""
    from dashinfer_vlm.kernels.cuda.experts import multiply  # triton reads the environment when it is imported

    gate_up, down = _matrices(setting, dtype, hidden, inner, num_experts)
    return _Experts(
        "experts",
        partial(multiply, gate_up=gate_up, down=down),
        hidden,
        inner,
        lambda expert: (gate_up[expert].double(), down[expert].double()),
        gate_up[0].nbytes + down[0].nbytes,
    )


def _floats(
    setting: Setting, dtype: torch.dtype, hidden: int, inner: int, num_experts: int, *, blocks: bool
) -> _Experts:
    """Any numbers, with scales of about one; more than two rows are rounded."""
    from dashinfer_vlm.kernels.cuda.experts_floats import Stack, multiply

    stacks = []
    for weight in _matrices(setting, torch.float32, hidden, inner, num_experts):
        _, num_rows, depth = weight.shape
        sides = (-(-num_rows // fp8.BLOCK), -(-depth // fp8.BLOCK)) if blocks else (num_rows, 1)
        scales = 0.5 + torch.rand(num_experts, *sides, device=setting.device)
        stacks.append(Stack(weight.to(torch.float8_e4m3fn), scales))

    def wide(expert: int) -> tuple[Tensor, Tensor]:
        return _wide(stacks[0], expert), _wide(stacks[1], expert)

    name = "fp8 experts in blocks" if blocks else "fp8 experts"
    return _Experts(name, partial(multiply, gate_up=stacks[0], down=stacks[1]), hidden, inner, wide,
                    3 * hidden * inner, _rounded, 0.5, BFLOAT16_ERROR)  # fmt: skip


def _few(
    setting: Setting,
    dtype: torch.dtype,
    hidden: int,
    inner: int,
    num_experts: int,
    bits: int,
    *,
    has_zeros: bool = False,
) -> _Experts:
    from dashinfer_vlm.kernels.cuda.experts_grouped import multiply

    matrices = _matrices(setting, torch.float32, hidden, inner, num_experts)
    gate_up, down = (grouped.rounded(x.flatten(0, 1), bits) for x in matrices)
    if has_zeros:
        gate_up, down = (replace(x, shifts=torch.randint_like(x.scales, -3, 4)) for x in (gate_up, down))

    def of_expert(weight: GroupedWeight, expert: int) -> Tensor:
        size = len(weight.numbers) // num_experts
        rows = slice(expert * size, (expert + 1) * size)
        shifts = None if weight.shifts is None else weight.shifts[rows]
        of_one = replace(weight, numbers=weight.numbers[rows], scales=weight.scales[rows], shifts=shifts)
        return grouped.expand(of_one, torch.float64)

    def wide(expert: int) -> tuple[Tensor, Tensor]:
        return of_expert(gate_up, expert), of_expert(down, expert)

    num_bytes = sum(x.numbers.nbytes + x.scales.nbytes for x in (gate_up, down)) // num_experts
    name = f"{bits}-bit experts with zeros" if has_zeros else f"{bits}-bit experts"
    return _Experts(name, partial(multiply, gate_up=gate_up, down=down), hidden, inner, wide, num_bytes)


def _matrices(setting: Setting, dtype: torch.dtype, hidden: int, inner: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Gates and ups, and `down`, of each expert."""

    def random(size: int, depth: int) -> Tensor:
        return torch.randn(num_experts, size, depth, device=setting.device, dtype=dtype).div_(depth**0.5)

    return random(2 * inner, hidden), random(hidden, inner)


def _wide(stack: Stack, expert: int) -> Tensor:
    numbers, scales = stack.numbers[expert].double(), stack.scales[expert].double()
    if stack.is_in_blocks:
        num_rows, depth = numbers.shape
        scales = scales.repeat_interleave(fp8.BLOCK, 0)[:num_rows].repeat_interleave(fp8.BLOCK, 1)[:, :depth]
    return numbers * scales


def _rounded(x: Tensor) -> Tensor:
    numbers, scales = fp8.quantise(x)
    return numbers.double() * scales.double()


def _mixture(
    setting: Setting, dtype: torch.dtype, experts: _Experts, num_experts: int, num_rows: int, count: int
) -> Case:
    """Bound by reading those that anybody chose."""
    from dashinfer_vlm.kernels.cuda.experts_alone import MOST_ALONE

    taken, allowed = (Tensor.double, 0.0) if num_rows <= MOST_ALONE else (experts.taken, experts.allowed)
    x, residual = (torch.randn(num_rows, experts.hidden, device=setting.device).to(dtype) for _ in range(2))
    of_rows, places = torch.randn(num_rows, num_experts).softmax(1).topk(count)
    chosen, shares = places.int().to(setting.device), of_rows.to(setting.device, dtype)

    def want() -> Tensor:
        y = residual.double()
        rows = taken(x)
        for expert in places.unique().tolist():
            mine, column = (chosen == expert).nonzero(as_tuple=True)
            first, second = experts.wide(expert)
            h = activation.silu_mul(F.linear(rows[mine], first))
            y[mine] += shares[mine, column].double()[:, None] * F.linear(taken(h), second)
        return y

    return Case(
        f"{experts.name} of {num_rows} rows",
        partial(experts.multiply, x, chosen=chosen, shares=shares, residual=residual),
        want,
        len(places.unique()) * experts.num_bytes,
        6 * num_rows * count * experts.hidden * experts.inner * experts.flops,
        bar=1.5,
        allowed=allowed,
    )
