"""How a model computes on a card: `Backend`s with the kernels of `kernels/cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.kernels.grouped import GROUP
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
    from dashinfer_vlm.kernels.cuda import experts as kernels
    from dashinfer_vlm.layers.cuda import (
        OPS,
        CudaExperts,
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
        first = matrices[0]
        stack = torch.empty(len(matrices), first.num_rows, first.depth, dtype=dtype, device=device)
        for place, matrix in zip(stack, matrices, strict=True):
            place.copy_(own_copy(matrix.read(), device, dtype))
        return stack

    def experts(router: Tensor, gate_ups: Sequence[Matrix], downs: Sequence[Matrix], routing: Routing) -> Experts:
        weights = partial(kernels.multiply, gate_up=stacked(gate_ups), down=stacked(downs))
        return CudaExperts(router, weights, routing)

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
        make_experts=experts,
        make_unrounded=CudaRouter,
        make_patches=patches,
    )


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
    from dashinfer_vlm.layers.cuda import CudaHead, CudaLinear, grouped_ops, multiplies_into_float32

    ops = grouped_ops(CudaHead if multiplies_into_float32(device, dtype) else CudaLinear)
    layers, head = (
        grouped_linears(device, dtype, bits, ops, is_head=i == 1) for i, bits in enumerate(BITS[quant_type])
    )
    return replace(on_card(device, dtype), name=f"triton, {quant_type}", make_linear=layers, make_head=head,
                   make_stream_linear=None, is_quantised=True, make_experts=_no_experts(quant_type))  # fmt: skip


def grouped_linears(
    device: torch.device, dtype: torch.dtype, bits: int, ops: GroupedOps, *, is_head: bool = False
) -> LinearFactory:
    """Layers whose weights are first of `dtype`, as they would be without quantisation, then of 8 or 4 bits."""

    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
        if bits == 4 and weight.nibbles is not None and weight.nibbles.group == GROUP:
            found = grouped.as_stored(weight.nibbles, weight.depth, device)
        else:
            tensor = weight.read()
            found = grouped.rounded(tensor if weight.is_kept else own_copy(tensor, device, dtype), bits)
        return GroupedLinear(found, bias, epilogue, ops, is_head=is_head)

    return make


def in_floats(device: torch.device, dtype: torch.dtype) -> Backend:
    """As `on_card`, the text model's layers but the head in 8-bit floats; on a CPU where triton interprets."""
    from dashinfer_vlm.kernels.cuda.experts_floats import Stack, multiply
    from dashinfer_vlm.layers.cuda import FP8_OPS, CudaExperts

    def stacked(matrices: Sequence[Matrix]) -> Stack:
        own = all(matrix.read_floats is not None for matrix in matrices)  # else their scales would not be alike
        first = _floats_of(matrices[0], device, dtype, FP8_OPS, own=own)
        stack = Stack(*(x.new_empty(len(matrices), *x.shape) for x in (first.numbers, first.scales)))
        for numbers, scales, matrix in zip(stack.numbers, stack.scales, matrices, strict=True):
            found = _floats_of(matrix, device, dtype, FP8_OPS, own=own)
            numbers.copy_(found.numbers)
            scales.copy_(found.scales)
        return stack

    def experts(router: Tensor, gate_ups: Sequence[Matrix], downs: Sequence[Matrix], routing: Routing) -> Experts:
        weights = partial(multiply, gate_up=stacked(gate_ups), down=stacked(downs))
        return CudaExperts(router, weights, routing)

    layers = float_linears(device, dtype, FP8_OPS)
    return replace(on_card(device, dtype), name="triton, fp8", make_linear=layers, make_stream_linear=None,
                   is_quantised=True, make_experts=experts)  # fmt: skip


def _no_experts(quant_type: str) -> ExpertsFactory:
    """They would silently stay what they are otherwise."""

    def refuse(router: Tensor, gate_ups: Sequence[Matrix], downs: Sequence[Matrix], routing: Routing) -> Experts:
        raise ConfigError(f"--quant-type {quant_type}: cards have no experts of so few bits; take fp8")

    return refuse


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
