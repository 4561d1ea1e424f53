"""Products of few rows as they are served, in every precision, beside torch's alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product as each
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from card_checks.results import Check, Setting
from card_checks.rows import Row
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.fp8 import Fp8Linear
from dashinfer_vlm.layers.fp8 import rounded as in_floats
from dashinfer_vlm.layers.grouped import GroupedLinear, rounded

EPS = 1e-6
SHAPES = {
    "2b": {"qkv": (2048, 1536), "gate_up": (17920, 1536), "down": (1536, 8960), "head": (151_936, 1536)},
    "7b": {"qkv": (4608, 3584), "gate_up": (37888, 3584), "down": (3584, 18944), "head": (152_064, 3584)},
}
"""Rows and columns of weights."""
COUNTS = (1, 16, 64)


def products(setting: Setting) -> Iterator[Check]:
    """Each product with what surrounds it in a layer: the norm before `qkv` and `gate_up`, whose halves SiLU joins, and
    the residual behind `down`. The floor reads 16 bits of each number; `bare` is torch's product alone."""
    if setting.tiny:
        shapes, counts = {"tiny": {"gate_up": (64, 32), "down": (32, 64)}}, (1,)
    else:
        shapes, counts = SHAPES, COUNTS
    for size, layers in shapes.items():
        for (layer, (num_rows, depth)), count in each(layers.items(), counts):
            yield f"{size} {layer} of {count}", partial(_product, setting, layer, num_rows, depth, count)


def every_way(setting: Setting) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, without its times."""
    for (size, layers), count in each(SHAPES.items(), COUNTS):
        for layer, (num_rows, depth) in layers.items():
            for name, way in _ways(setting, *_tensors(setting, layer, num_rows, depth, count), layer).items():
                yield f"{size} {layer} of {count}, {name}", way


def _product(setting: Setting, layer: str, size: int, depth: int, count: int) -> Row:
    ways = _ways(setting, *_tensors(setting, layer, size, depth, count), layer)
    found = {name: setting.time(way, as_graph=True) for name, way in ways.items()}
    floor = setting.ceilings.seconds(2 * size * depth, 2 * size * depth * count)
    return Row(seconds=found.pop("served"), floor=floor, others=found)


def _tensors(
    setting: Setting, layer: str, size: int, depth: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows, weight, the norm's weight, residual."""
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    x, weight, gains, residual = (
        torch.randn(*shape, device=setting.device).to(dtype)
        for shape in ((count, depth), (size, depth), (depth,), (count, size))
    )
    return x, weight, gains, residual if layer == "down" else None


def _ways(
    setting: Setting, x: Tensor, weight: Tensor, gains: Tensor, residual: Tensor | None, layer: str
) -> dict[str, Callable[[], Any]]:
    from dashinfer_vlm.layers.cuda import FP8_OPS, CudaHead, CudaLinear, grouped_ops  # imports triton

    epilogue: Epilogue = "silu_mul" if layer == "gate_up" else "none"
    has_norm = layer in ("qkv", "gate_up")

    def served(linear: Any) -> Callable[[], Tensor]:
        return lambda: linear(linear.normed(x, gains, EPS) if has_norm else x, residual=residual)

    ways: dict[str, Callable[[], Any]] = {
        "served": served(CudaLinear(weight, None, epilogue)),
        "bare": lambda: F.linear(x, weight),
    }
    for bits in (8, 4):
        ways[f"a16w{bits}"] = served(GroupedLinear(rounded(weight, bits), None, epilogue, grouped_ops(CudaHead)))
    if setting.multiplies_floats_of_8_bits:
        ways["fp8"] = served(Fp8Linear(in_floats(weight, FP8_OPS), None, epilogue, FP8_OPS))
    return ways
