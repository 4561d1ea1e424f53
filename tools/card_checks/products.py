"""Products of few rows as they are served, beside torch's, those of 8 and 4 bits by `kernels.cuda.skinny`, and of
8-bit floats."""

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
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers.fp8 import Fp8Linear
from dashinfer_vlm.layers.fp8 import rounded as in_floats
from dashinfer_vlm.layers.grouped import rounded

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
    from dashinfer_vlm.kernels.cuda import rows, skinny  # triton reads the environment when it is imported
    from dashinfer_vlm.layers.cuda import FP8_OPS, CudaLinear

    is_gated, has_norm = layer == "gate_up", layer in ("qkv", "gate_up")
    epilogue = "silu_mul" if is_gated else "none"
    whole = CudaLinear(weight, None, epilogue)

    def before() -> Tensor:
        return rows.rms_norm(x, gains, EPS) if has_norm else x

    def few(weight: GroupedWeight) -> Callable[[], Tensor]:
        return lambda: skinny.product(before(), weight, silu_mul=is_gated, residual=residual)

    ways: dict[str, Callable[[], Any]] = {
        "served": lambda: whole(whole.normed(x, gains, EPS) if has_norm else x, residual=residual),
        "bare": lambda: F.linear(x, weight),
        "a16w8": few(rounded(weight, 8)),
        "a16w4": few(rounded(weight, 4)),
    }
    if setting.multiplies_floats_of_8_bits:
        floats = Fp8Linear(in_floats(weight, FP8_OPS), None, epilogue, FP8_OPS)
        ways["fp8"] = lambda: floats(before(), residual=residual)
    return ways
