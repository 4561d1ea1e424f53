"""How a model computes on a card: `Backend`s with the kernels of `kernels/cuda`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight
from dashinfer_vlm.layers import grouped
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.backend import Backend, LinearFactory, TensorLinear, of_own_copies, own_copy
from dashinfer_vlm.layers.experts import Experts, ExpertsFactory, Routing
from dashinfer_vlm.layers.fp8 import Fp8Linear, Fp8Ops, rounded
from dashinfer_vlm.layers.grouped import BITS, GroupedLinear, GroupedOps
from dashinfer_vlm.layers.linear import Floats, Linear, Matrix
from dashinfer_vlm.layers.patches import Patches, TorchPatches

__all__ = ["float_linears", "grouped_linears", "in_floats", "in_groups", "on_card", "quantised_on_card"]


def on_card(device: torch.device, dtype: torch.dtype) -> Backend:
    """The kernels of `kernels/cuda`, which must be available; on a CPU where triton interprets them."""
    from dashinfer_vlm.kernels.cuda.experts import multiply
    from dashinfer_vlm.layers.cuda import (
        OPS,
        CudaHead,
        CudaLinear,
        CudaPatches,
        CudaRouter,
        CudaStreamLinear,
        multiplies_into_float32,
    )

    head: TensorLinear = CudaHead if multiplies_into_float32(device, dtype) else CudaLinear

    def patches(weight: Tensor, bias: Tensor) -> Patches:
        return TorchPatches(weight, bias) if dtype == torch.float32 else CudaPatches(weight, bias)

    def stacked(matrices: Sequence[Matrix]) -> Tensor:
        return _stacked(len(matrices), ((own_copy(matrix.read(), device, dtype),) for matrix in matrices))[0]

    return Backend(
        name="triton",
        channel_unit=64,
        leaves_out_biases=True,
        device=device,
        weight_dtype=dtype,
        activation_dtype=dtype,
        ops=OPS,
        make_linear=of_own_copies(CudaLinear, device, dtype),
        make_head=of_own_copies(head, device, dtype),
        make_stream_linear=of_own_copies(CudaStreamLinear, device, dtype),
        make_experts=_experts_of(multiply, stacked),
        make_unrounded=CudaRouter,
        make_patches=patches,
    )


def _experts_of(multiply: Callable[..., Tensor], stacked: Callable[[Sequence[Matrix]], Any]) -> ExpertsFactory:
    """Mixtures whose weights are `stacked`, which is what `multiply` takes."""
    from dashinfer_vlm.layers.cuda import CudaExperts

    def make(router: Tensor, gate_ups: Sequence[Matrix], downs: Sequence[Matrix], routing: Routing) -> Experts:
        return CudaExperts(router, partial(multiply, gate_up=stacked(gate_ups), down=stacked(downs)), routing)

    return make


def _stacked(count: int, parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Of each tensor of `count` parts [count, ...]; a part goes there before the next one is made."""
    stacks: list[Tensor] = []
    for i, part in enumerate(parts):
        stacks = stacks or [x.new_empty(count, *x.shape) for x in part]
        for stack, x in zip(stacks, part, strict=True):
            stack[i].copy_(x)
    return stacks


def quantised_on_card(device: torch.device, dtype: torch.dtype, quant_type: str) -> Backend:
    """Raises ConfigError for what cards do not compute with."""
    why = cuda.why_unavailable()
    if why is not None:
        raise ConfigError(f"--quant-type {quant_type} needs the kernels for cards: {why}")
    if quant_type in BITS:
        return in_groups(device, dtype, quant_type)
    if quant_type != "fp8":
        raise ConfigError(f"--quant-type {quant_type} computes on processors; on cards take fp8, a16w8 or a16w4")
    if dtype != torch.bfloat16:
        raise ConfigError(f"--quant-type fp8 computes with activations in bfloat16, not {_name(dtype)}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ConfigError("--quant-type fp8 needs a card of compute capability 8.9 (Ada, Hopper) or later")
    if capability == (8, 9) and _torch_version() < (2, 12):  # its product runs on no stream of ours: pytorch#177651
        raise ConfigError(f"--quant-type fp8 on an Ada card needs torch 2.12 or later, not {torch.__version__}")
    return in_floats(device, dtype)


def in_groups(device: torch.device, dtype: torch.dtype, quant_type: str) -> Backend:
    """As `on_card`, the text model's layers in 8 or 4 bits and its head in 8; on a CPU where triton interprets."""
    from dashinfer_vlm.kernels.cuda.experts_grouped import multiply
    from dashinfer_vlm.layers.cuda import CudaHead, CudaLinear, grouped_ops, multiplies_into_float32

    ops = grouped_ops(CudaHead if multiplies_into_float32(device, dtype) else CudaLinear)
    layers, head = (
        grouped_linears(device, dtype, bits, ops, is_head=i == 1) for i, bits in enumerate(BITS[quant_type])
    )

    def stacked(matrices: Sequence[Matrix]) -> GroupedWeight:
        bits, _ = BITS[quant_type]
        few = (_few_of(matrix, device, dtype, bits) for matrix in matrices)
        parts = ((x.numbers, x.scales, torch.zeros_like(x.scales) if x.shifts is None else x.shifts) for x in few)
        numbers, scales, shifts = (x.flatten(0, 1) for x in _stacked(len(matrices), parts))
        may_shift = any(matrix.nibbles is not None and matrix.nibbles.has_zeros for matrix in matrices)
        found = shifts if may_shift and bool(shifts.any()) else None
        return GroupedWeight(numbers, scales, matrices[0].depth, bits, found)

    return replace(on_card(device, dtype), name=f"triton, {quant_type}", make_linear=layers, make_head=head,
                   make_stream_linear=None, is_quantised=True, make_experts=_experts_of(multiply, stacked))  # fmt: skip


def grouped_linears(
    device: torch.device, dtype: torch.dtype, bits: int, ops: GroupedOps, *, is_head: bool = False
) -> LinearFactory:
    """Layers whose weights are first of `dtype`, as they would be without quantisation, then of 8 or 4 bits."""

    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
        return GroupedLinear(_few_of(weight, device, dtype, bits), bias, epilogue, ops, is_head=is_head)

    return make


def _few_of(weight: Matrix, device: torch.device, dtype: torch.dtype, bits: int) -> GroupedWeight:
    """On the device: 4 bits as the checkpoint has them, where it does."""
    if bits == 4 and weight.nibbles is not None and weight.nibbles.group == GROUP:
        return grouped.as_stored(weight.nibbles, weight.depth, device)
    tensor = weight.read()
    return grouped.rounded(tensor if weight.is_kept else own_copy(tensor, device, dtype), bits)


def in_floats(device: torch.device, dtype: torch.dtype) -> Backend:
    """As `on_card`, the text model's layers but the head in 8-bit floats; on a CPU where triton interprets."""
    from dashinfer_vlm.kernels.cuda.experts_floats import Stack, multiply
    from dashinfer_vlm.layers.cuda import FP8_OPS

    def stacked(matrices: Sequence[Matrix]) -> Stack:
        own = all(matrix.read_floats is not None for matrix in matrices)  # else their scales would not be alike
        floats = (_floats_of(matrix, device, dtype, FP8_OPS, own=own) for matrix in matrices)
        return Stack(*_stacked(len(matrices), ((x.numbers, x.scales) for x in floats)))

    layers = float_linears(device, dtype, FP8_OPS)
    return replace(on_card(device, dtype), name="triton, fp8", make_linear=layers, make_stream_linear=None,
                   is_quantised=True, make_experts=_experts_of(multiply, stacked))  # fmt: skip


def float_linears(device: torch.device, dtype: torch.dtype, ops: Fp8Ops) -> LinearFactory:
    """Layers of 8-bit floats: the checkpoint's own where it has them, else weights of `dtype` rounded on the device."""

    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
        floats = _floats_of(weight, device, dtype, ops)
        if not floats.is_in_blocks:
            _check_sides(weight)
        return Fp8Linear(floats, bias, epilogue, ops)

    return make


def _floats_of(weight: Matrix, device: torch.device, dtype: torch.dtype, ops: Fp8Ops, *, own: bool = True) -> Floats:
    """On the device: the checkpoint's own where it has them, and `own` says so."""
    if weight.read_floats is None or not own:
        return rounded(own_copy(weight.read(), device, dtype), ops)
    stored = weight.read_floats()
    numbers, scales = (own_copy(x, device, x.dtype) for x in (stored.numbers, stored.scales))
    return Floats(numbers, scales, stored.is_in_blocks)


def _check_sides(weight: Matrix) -> None:
    """What torch's product of 8-bit floats asks for."""
    if weight.num_rows % 16 or weight.depth % 16:
        found = f"{weight.name} is {weight.num_rows} x {weight.depth}"
        raise ConfigError(f"--quant-type fp8: {found}; products of 8-bit floats need multiples of 16")


def _torch_version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
