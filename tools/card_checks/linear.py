"""Products with weights, in every layout of them, and what rides in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product as each

import torch
from torch import Tensor
from torch.nn import functional as F

from card_checks.cases import Case
from card_checks.results import Setting
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers import activation, fp8, grouped, norm


def cases(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    if dtype == torch.bfloat16:
        yield from _patches(setting, small=small)
    yield from _single(setting, dtype, small=small)
    yield from _some(setting, dtype, small=small)
    yield from _floats(setting, dtype, small=small)


def _patches(setting: Setting, *, small: bool) -> Iterator[Case]:
    """A ViT's first layer, from patches as long as those of Qwen2-VL and of Qwen3-VL."""
    from dashinfer_vlm.layers.cuda import CudaPatches  # triton reads the environment when it is imported

    for depth in (1176, 1536):
        count, size = (300, 200) if small else (21904, 1280)
        patches = torch.randint(0, 256, (count, depth), dtype=torch.uint8, device=setting.device)
        weight, bias = (torch.randn(*shape, device=setting.device) for shape in ((size, depth), (size,)))
        yield Case(
            f"patches of {depth} bytes",
            partial(CudaPatches(weight, bias), patches),
            partial(F.linear, patches.double(), weight.double(), bias.double()),
            patches.nbytes + 4 * count * size,
            2 * 2 * count * size * depth,
            bar=2.0,
        )


def _single(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """A row by itself, with all that rides in its product."""
    from dashinfer_vlm.kernels.cuda import gemv  # triton reads the environment when it is imported

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype) / shape[-1] ** 0.5

    for name, size, depth in (("MLP", 66, 200), ("down", 37, 9000)) if small else (("MLP", 17920, 1536),):
        x, weight, gains, bias = random(1, depth), random(size, depth), random(depth), random(size)
        is_gated = name == "MLP"
        residual = random(1, size // 2 if is_gated else size)

        def want(x=x, weight=weight, gains=gains, bias=bias, residual=residual, is_gated=is_gated) -> Tensor:
            y = norm.rms_norm(x.double(), gains.double(), 1e-6) if is_gated else x.double()
            y = F.linear(y, weight.double(), bias.double())
            return (activation.silu_mul(y) if is_gated else y) + residual.double()

        run = partial(
            gemv.product, x, weight, bias, gains=gains if is_gated else None, eps=1e-6, silu_mul=is_gated,
            residual=residual,
        )  # fmt: skip
        yield Case(f"one row of {name}", run, want, weight.nbytes, bar=1.4)
        yield from _narrow(setting, name, x, weight, residual, is_gated=is_gated)


def _narrow(
    setting: Setting, name: str, x: Tensor, weight: Tensor, residual: Tensor, *, is_gated: bool
) -> Iterator[Case]:
    """The same of 8 and 4 bits, and of 8-bit floats, which nothing but the residual rides in."""
    from dashinfer_vlm.kernels.cuda import narrow  # triton reads the environment when it is imported

    for bits, few in _few_bits(weight):

        def want(few: GroupedWeight = few) -> Tensor:
            y = F.linear(x.double(), grouped.expand(few, torch.float64))
            return (activation.silu_mul(y) if is_gated else y) + residual.double()

        run = partial(narrow.of_groups, x, few, silu_mul=is_gated, residual=residual)
        yield Case(f"one row of {name} in {bits}", run, want, few.numbers.nbytes + few.scales.nbytes, bar=1.6)
    if not setting.multiplies_floats_of_8_bits or is_gated:
        return
    (numbers, scales), (row, of_row) = fp8.quantise(weight), fp8.quantise(x)
    yield Case(
        f"one row of {name} in 8-bit floats",
        partial(narrow.of_floats, row, of_row, numbers, scales, x.dtype, None, residual),
        lambda: F.linear(row.double() * of_row, numbers.double() * scales) + residual.double(),
        numbers.nbytes,
        bar=1.6,
    )


def _few_bits(weight: Tensor) -> Iterator[tuple[str, GroupedWeight]]:
    """In 8 bits, in 4, and in 4 whose groups have zeros."""
    yield "8 bits", grouped.rounded(weight, 8)
    few = grouped.rounded(weight, 4)
    yield "4 bits", few
    shifts = torch.randint(-7, 9, few.scales.shape, device=weight.device)
    yield "4 bits and zeros", replace(few, shifts=shifts.to(few.scales.dtype))


def _some(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Few rows, in every layout of the weight, with what rides in their product; columns shared where rows are few."""
    from dashinfer_vlm.kernels.cuda import skinny  # triton reads the environment when it is imported

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype) / shape[-1] ** 0.5

    counts, layers = (
        ((3, 37), (("MLP", 136, 264), ("down", 72, 1032))) if small else ((8, 64), (("down", 3584, 18944),))
    )
    for (name, size, depth), count in each(layers, counts):
        x, weight, bias, is_gated = random(count, depth), random(size, depth), random(size), name == "MLP"
        residual = random(count, size // 2 if is_gated else size)
        for bits, few in [("16 bits", weight), *([] if is_gated else _few_bits(weight))]:

            def want(few=few, x=x, bias=bias, residual=residual, is_gated=is_gated) -> Tensor:
                wide = few.double() if isinstance(few, Tensor) else grouped.expand(few, torch.float64)
                y = F.linear(x.double(), wide, bias.double())
                return (activation.silu_mul(y) if is_gated else y) + residual.double()

            run = partial(skinny.product, x, few, bias, silu_mul=is_gated, residual=residual)
            moved = few.nbytes if isinstance(few, Tensor) else few.numbers.nbytes + few.scales.nbytes
            yield Case(f"{count} rows of {name} in {bits}", run, want, moved, bar=1.3)


def _floats(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Products in 8-bit floats with a scale per block; those of few rows are bound by reading the weight."""
    if not setting.multiplies_floats_of_8_bits:
        return
    from dashinfer_vlm.kernels.cuda import fp8 as kernels  # triton reads the environment when it is imported

    yield from _some_floats(setting, dtype, small=small)
    size, depth = (130, 200) if small else (3584, 18944)
    weight = torch.randn(size, depth, device=setting.device).to(torch.float8_e4m3fn)
    of_blocks = torch.rand(-(-size // fp8.BLOCK), -(-depth // fp8.BLOCK), device=setting.device)
    for num_rows in (3, 20) if small else (16,):
        x, scales = fp8.quantise(torch.randn(num_rows, depth, device=setting.device), fp8.BLOCK)
        yield Case(
            f"fp8 product of {num_rows} rows",
            partial(kernels.block_product, x, scales, weight, of_blocks, dtype),
            partial(fp8.block_product, x, scales, weight, of_blocks, torch.float64),
            weight.nbytes + x.nbytes,
            allowed=1e-3,  # a card adds products of 8-bit floats with fewer bits than float32 has: 1.2e-4 on an H200
        )


def _some_floats(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Few rows of 8-bit floats, with a scale per row."""
    from dashinfer_vlm.kernels.cuda import skinny_floats  # triton reads the environment when it is imported

    size, depth = (130, 1040) if small else (3584, 18944)
    weight, of_weight = fp8.quantise(torch.randn(size, depth, device=setting.device))
    for count in (3, 37) if small else (8, 64):
        x, scales = fp8.quantise(torch.randn(count, depth, device=setting.device))
        residual = torch.randn(count, size, device=setting.device).to(dtype)

        def want(x=x, scales=scales, residual=residual) -> Tensor:
            return F.linear(x.double() * scales, weight.double() * of_weight) + residual.double()

        run = partial(skinny_floats.product, x, scales, weight, of_weight, dtype, None, residual)
        yield Case(f"{count} rows in 8-bit floats", run, want, weight.nbytes, bar=1.3, allowed=1e-3)
