"""Where and how the layers compute. Decided once, before weights are prepared; this is the one seam between plain
torch and faster implementations of the same functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops, cuda
from dashinfer_vlm.layers import grouped, onednn
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.fp8 import Fp8Linear, Fp8Ops, rounded
from dashinfer_vlm.layers.grouped import BITS, GroupedLinear, GroupedOps
from dashinfer_vlm.layers.linear import (
    ExpandingLinear,
    Floats,
    Linear,
    Matrix,
    NativeLinear,
    NormingLinear,
    OneDnnLinear,
    Stream,
    StreamLinear,
    TorchLinear,
    whole,
)
from dashinfer_vlm.layers.memory import in_huge_pages
from dashinfer_vlm.layers.ops import NATIVE, NATIVE_BFLOAT16, REFERENCE, Ops
from dashinfer_vlm.layers.patches import NativePatches, Patches, TorchPatches
from dashinfer_vlm.layers.quantise import QUANT_TYPES, PackedStore, QuantisedLinears
from dashinfer_vlm.layers.ranks import ALONE, JoinedLinear, Ranks, SummedLinear
from dashinfer_vlm.layers.upload import upload_to

__all__ = [
    "Backend",
    "LinearFactory",
    "choose_backend",
    "in_floats",
    "on_card",
]

logger = logging.getLogger(__name__)

LinearFactory = Callable[[Matrix, Tensor | None, Epilogue], Linear]
TensorLinear = Callable[[Tensor, Tensor | None, Epilogue], Linear]
_L = TypeVar("_L", bound=StreamLinear)


@dataclass(frozen=True, slots=True)
class Backend:
    """How one model computes: device, types, functions and the class of its linear layers."""

    name: str
    device: torch.device
    weight_dtype: torch.dtype
    """Type of stored weights, and of the KV cache unless another one is asked for."""
    activation_dtype: torch.dtype
    ops: Ops
    make_linear: LinearFactory
    make_head: LinearFactory | None = None
    """As `make_linear`, for the last layer of the text model; None: `make_linear`."""
    make_stream_linear: Callable[[Matrix, Tensor | None, Epilogue], StreamLinear] | None = None
    """As `make_linear`, for layers onto the text model's residual stream; None: `make_linear`."""
    make_patches: Callable[[Tensor, Tensor], Patches] = TorchPatches
    """First layer of a ViT from a float32 weight and bias on the device."""
    ranks: Ranks = ALONE
    """Who shares the model's layers."""
    channel_unit: int = 1
    """Products are slow where the channels between two layers are no multiple of it, and zeros cost nothing."""
    leaves_out_biases: bool = False
    """Whether what layers add to a ViT's residual stream goes without their biases, whose sum the norms add that read
    it. A product that adds to something has no room for a bias on cards, and would take a launch more."""
    is_native: bool = False
    """Whether the native kernels do all that is heavy, and torch only moves small tensors."""

    def weight(self, tensor: Tensor) -> Tensor:
        """Own copy of a large matrix in the stored type, on the device."""
        return _own_copy(tensor, self.device, self.weight_dtype)

    def vector(self, tensor: Tensor) -> Tensor:
        """Own copy of a norm's weight or of a bias, in the activations' type, on the device."""
        return tensor.to(self.device, self.activation_dtype, copy=True)

    def linear(self, weight: Matrix, bias: Tensor | None = None, *, epilogue: Epilogue = "none") -> Linear:
        """Linear layer of `weight` [N, K] and `bias` [N]."""
        return self.make_linear(weight, None if bias is None else self.vector(bias), epilogue)

    def norm_before(self, layer: Linear, weight: Tensor, eps: float) -> Callable[[Stream], Any]:
        """RMSNorm of rows that only `layer` takes, from them to what it takes; afterwards they are whole."""
        gains = self.vector(weight)
        if isinstance(layer, NormingLinear):
            return lambda x: layer.normed(x, gains, eps)
        return lambda x: self.ops.rms_norm(whole(x), gains, eps)

    def before(self, layer: Linear, then: StreamLinear) -> Callable[[Any], Any]:
        """`layer`, whose epilogue is `silu_mul` and whose result only `then` takes, to what that takes."""
        last = then.part if isinstance(then, SummedLinear) else then
        if isinstance(layer, Fp8Linear) and isinstance(last, Fp8Linear):
            return lambda x: layer.into(x, last)
        return layer

    def summed(self, weight: Matrix) -> StreamLinear:
        """Linear layer onto the residual stream, whose columns are dealt out among the ranks."""
        if not self.ranks.are_several:
            return (self.make_stream_linear or self.make_linear)(weight, None, "none")
        return SummedLinear(self.linear(weight), self.ranks)

    def head(self, weight: Matrix) -> Linear:
        """The last layer of the text model, from hidden states to logits; its rows are dealt out among the ranks."""
        part = (self.make_head or self.make_linear)(weight, None, "none")
        return JoinedLinear(part, self.ranks) if self.ranks.are_several else part


def _own_copy(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu":
        return in_huge_pages(tensor, dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return upload_to(device)(tensor, dtype)
    return tensor.to(device, dtype, copy=True)


def choose_backend(
    device: torch.device,
    weight_dtype: torch.dtype,
    quant_type: str = "none",
    store: PackedStore | None = None,
    ranks: Ranks = ALONE,
) -> Backend:
    """The fastest backend for `device` and weights stored as `weight_dtype`, or quantised; the choice is logged.

    `store` is where quantised weights of former starts are looked for, and kept for the next. Raises ConfigError when
    quantised weights are asked for where nothing computes with them.
    """
    backend = replace(_choose(device, weight_dtype, quant_type, store), ranks=ranks)
    logger.info(
        "compute: %s on %s, weights %s, activations %s",
        backend.name,
        device,
        weight_dtype if quant_type == "none" else quant_type,
        backend.activation_dtype,
    )
    return backend


def _choose(device: torch.device, weight_dtype: torch.dtype, quant_type: str, store: PackedStore | None) -> Backend:
    if quant_type != "none" and device.type == "cuda":
        return _quantised_on_card(device, weight_dtype, quant_type)
    if quant_type != "none":
        return _quantised(device, weight_dtype, quant_type, store)
    if device.type == "cuda":
        why = cuda.why_unavailable()
        if why is None:
            return on_card(device, weight_dtype)
        logger.warning("no kernels for the card: %s; plain torch computes, many times slower", why)
    if device.type != "cpu":
        as_it_is = _of_own_copies(TorchLinear, device, weight_dtype)
        return Backend("torch", device, weight_dtype, weight_dtype, REFERENCE, as_it_is)
    could_be_native = weight_dtype in (torch.bfloat16, torch.float32)
    if could_be_native and not cpu_ops.available():
        _tell_once(f"no native kernels: {cpu_ops.why_unavailable()}; plain torch computes, slower")
    if weight_dtype == torch.bfloat16 and onednn.available() and not _native_multiplies_bfloat16():
        return Backend("oneDNN", device, weight_dtype, weight_dtype, REFERENCE, _one_dnn)
    if could_be_native and cpu_ops.available():
        layers = partial(_packed, weight_dtype)
        return _native(device, weight_dtype, layers, layers)
    plain: TensorLinear = TorchLinear if weight_dtype == torch.float32 else ExpandingLinear
    make = _of_own_copies(plain, device, weight_dtype)
    return Backend("torch", device, weight_dtype, torch.float32, REFERENCE, make)


def on_card(device: torch.device, dtype: torch.dtype) -> Backend:
    """The kernels of `kernels/cuda`, which must be available; on a CPU where triton interprets them."""
    from dashinfer_vlm.layers.cuda import (
        OPS,
        CudaHead,
        CudaLinear,
        CudaPatches,
        CudaStreamLinear,
        multiplies_into_float32,
    )

    head: TensorLinear = CudaHead if multiplies_into_float32(device, dtype) else CudaLinear

    def patches(weight: Tensor, bias: Tensor) -> Patches:
        return TorchPatches(weight, bias) if dtype == torch.float32 else CudaPatches(weight, bias, dtype)

    return Backend(
        name="triton",
        channel_unit=64,
        leaves_out_biases=True,
        device=device,
        weight_dtype=dtype,
        activation_dtype=dtype,
        ops=OPS,
        make_linear=_of_own_copies(CudaLinear, device, dtype),
        make_head=_of_own_copies(head, device, dtype),
        make_stream_linear=_of_own_copies(CudaStreamLinear, device, dtype),
        make_patches=patches,
    )


def _quantised_on_card(device: torch.device, dtype: torch.dtype, quant_type: str) -> Backend:
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
                   make_stream_linear=None)  # fmt: skip


def grouped_linears(
    device: torch.device, dtype: torch.dtype, bits: int, ops: GroupedOps, *, is_head: bool = False
) -> LinearFactory:
    """Layers whose weights are first of `dtype`, as they would be without quantisation, then of 8 or 4 bits."""

    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
        tensor = weight.read()
        there = tensor if weight.is_kept else _own_copy(tensor, device, dtype)
        return GroupedLinear(grouped.rounded(there, bits), bias, epilogue, ops, is_head=is_head)

    return make


def in_floats(device: torch.device, dtype: torch.dtype) -> Backend:
    """As `on_card`, the text model's layers but the head in 8-bit floats; on a CPU where triton interprets."""
    from dashinfer_vlm.layers.cuda import FP8_OPS

    layers = float_linears(device, dtype, FP8_OPS)
    return replace(on_card(device, dtype), name="triton, fp8", make_linear=layers, make_stream_linear=None)


def float_linears(device: torch.device, dtype: torch.dtype, ops: Fp8Ops) -> LinearFactory:
    """Layers of 8-bit floats: the checkpoint's own where it has them, else weights of `dtype` rounded on the device."""

    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
        if weight.read_floats is None:
            _check_sides(weight)
            return Fp8Linear(rounded(_own_copy(weight.read(), device, dtype), ops), bias, epilogue, ops)
        stored = weight.read_floats()
        if not stored.is_in_blocks:
            _check_sides(weight)
        numbers, scales = (_own_copy(x, device, x.dtype) for x in (stored.numbers, stored.scales))
        return Fp8Linear(Floats(numbers, scales, stored.is_in_blocks), bias, epilogue, ops)

    return make


def _check_sides(weight: Matrix) -> None:
    """What torch's product of 8-bit floats asks for."""
    if weight.num_rows % 16 or weight.depth % 16:
        found = f"{weight.name} is {weight.num_rows} x {weight.depth}"
        raise ConfigError(f"--quant-type fp8: {found}; products of 8-bit floats need multiples of 16")


def _torch_version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of_own_copies(
    linear_class: Callable[[Tensor, Tensor | None, Epilogue], _L], device: torch.device, dtype: torch.dtype
) -> Callable[[Matrix, Tensor | None, Epilogue], _L]:
    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> _L:
        tensor = weight.read()
        return linear_class(tensor if weight.is_kept else _own_copy(tensor, device, dtype), bias, epilogue)

    return make


def _one_dnn(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
    return OneDnnLinear(weight.read().to(torch.bfloat16), bias, epilogue)


def _packed(dtype: torch.dtype, weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> Linear:
    packed = cpu_ops.pack_linear(weight.read().to(dtype), gate_up=epilogue == "silu_mul")
    return NativeLinear(packed, bias, epilogue)


def _quantised(device: torch.device, weight_dtype: torch.dtype, quant_type: str, store: PackedStore | None) -> Backend:
    """Norms, embeddings and the KV cache keep `weight_dtype`."""
    if quant_type == "fp8":
        raise ConfigError("--quant-type fp8 computes on NVIDIA cards; on processors --quant-type a8w8 is as small")
    if not cpu_ops.available():
        raise ConfigError(f"--quant-type {quant_type} needs the native kernels: {cpu_ops.why_unavailable()}")
    if weight_dtype == torch.float16:
        raise ConfigError(
            f"--quant-type {quant_type} stores what it does not quantise as bfloat16 or float32, not float16"
        )
    layers, head = (QuantisedLinears(kind, weight_dtype, store) for kind in QUANT_TYPES[quant_type])
    return _native(device, weight_dtype, layers, head)


def _native(device: torch.device, weight_dtype: torch.dtype, layers: LinearFactory, head: LinearFactory) -> Backend:
    return Backend(
        name=f"native ({cpu_ops.isa()})",
        device=device,
        weight_dtype=weight_dtype,
        activation_dtype=torch.float32,
        ops=NATIVE_BFLOAT16 if weight_dtype == torch.bfloat16 else NATIVE,
        make_linear=layers,
        make_head=head,
        make_patches=NativePatches,
        is_native=True,
    )


@cache
def _tell_once(words: str) -> None:
    """The parts of a model choose one by one."""
    logger.warning(words)


def _native_multiplies_bfloat16() -> bool:
    return cpu_ops.available() and cpu_ops.multiplies_bfloat16()
