"""Each kernel against its reference, and against what the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from card_checks import attention, delta_net, experts, linear
from card_checks.cases import BFLOAT16_ERROR, Case
from card_checks.models import checked_backend
from card_checks.results import Check, Setting, error
from card_checks.rows import Row
from dashinfer_vlm.layers import activation, norm, rotary
from dashinfer_vlm.layers.ops import Ops


def check(setting: Setting) -> Iterator[Check]:
    """Small and odd sizes, every type, against float64; `measure` rehearses with bfloat16."""
    for dtype in (torch.float32,) if setting.tiny else (torch.bfloat16, torch.float32, torch.float16):
        for case in cases(setting, dtype, small=True):
            yield (
                f"{case.name} {_short(dtype)}",
                partial(_right, case, 1e-5 if dtype == torch.float32 else BFLOAT16_ERROR),
            )
    for case in () if setting.tiny else experts.of_published_size(setting, (2, 16, 300, 2048)):
        yield f"{case.name} of published size", partial(_right, case, BFLOAT16_ERROR)


def _right(case: Case, allowed: float) -> Row:
    return Row(error=error(case.run(), case.want()), allowed=max(allowed, case.allowed))


def measure(setting: Setting) -> Iterator[Check]:
    """Sizes of service in bfloat16."""
    for case in cases(setting, torch.bfloat16, small=setting.tiny):
        yield case.name, partial(_timed, setting, case)
    if not setting.tiny:
        yield from attention.yardsticks(setting)


def _timed(setting: Setting, case: Case) -> Row:
    floor = setting.ceilings.seconds(num_bytes=case.num_bytes, attention_flops=case.flops)
    return Row(seconds=setting.time(case.run, as_graph=True), floor=floor, bar=case.bar)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(setting: Setting, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    ops = checked_backend(setting, dtype).ops
    yield from _rows(setting, ops, dtype, 5 if small else 8192, 33 if small else 3584)
    yield from attention.cases_over_a_cache(setting, dtype, small=small)
    yield from linear.cases(setting, dtype, small=small)
    yield from attention.cases_of_pictures(setting, dtype, small=small)
    yield from experts.cases(setting, dtype, small=small)
    yield from delta_net.cases(setting, dtype, small=small)


def _rows(setting: Setting, ops: Ops, dtype: torch.dtype, num_rows: int, size: int) -> Iterator[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device).to(dtype)

    x, weight, bias = random(num_rows, size), random(size), random(size)
    shift = torch.randn(size, device=setting.device)
    moved = 2 * x.nbytes
    yield Case(
        "rms_norm",
        lambda: ops.rms_norm(x, weight, 1e-6),
        lambda: norm.rms_norm(x.double(), weight.double(), 1e-6),
        moved,
    )
    yield Case(
        "layer_norm",
        lambda: ops.layer_norm(x, weight, bias, 1e-6, shift=shift),
        lambda: norm.layer_norm(x.double(), weight.double(), bias.double(), 1e-6, shift=shift),
        moved,
    )
    heads, dim = (3, 16) if num_rows < 100 else (32, 80)
    turned, angles = random(num_rows, heads, dim), torch.randn(num_rows, dim // 2, device=setting.device)
    cos, sin = angles.cos(), angles.sin()

    def rotate(function: Callable[[Tensor, Tensor, Tensor], None], values: Tensor) -> Tensor:
        function(values, cos, sin)
        return values

    yield Case(
        "rope and a copy",
        lambda: rotate(ops.rope, turned.clone()),
        lambda: rotate(rotary.rope, turned.double()),
        4 * turned.nbytes,
    )
    from dashinfer_vlm.kernels.cuda import rows as row_kernels  # triton reads the environment when it is imported

    wide = random(num_rows, 2 * size)
    yield Case(
        "silu_mul", lambda: row_kernels.silu_mul(wide), lambda: activation.silu_mul(wide.double()), 1.5 * wide.nbytes
    )
