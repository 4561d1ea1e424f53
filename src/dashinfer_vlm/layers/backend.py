"""Where and how the layers compute. Decided once, before weights are prepared; this is the one seam between plain
torch and faster implementations of the same functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops, cuda
from dashinfer_vlm.layers import onednn
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.experts import Experts, ExpertsFactory, Router, Routing, looped_experts
from dashinfer_vlm.layers.fp8 import Fp8Linear
from dashinfer_vlm.layers.linear import (
    ExpandingLinear,
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
    "TensorLinear",
    "choose_backend",
    "of_own_copies",
    "own_copy",
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
    make_experts: ExpertsFactory | None = None
    """Mixtures of experts; None: a layer of `make_linear` for each matrix."""
    make_unrounded: Callable[[Tensor], Linear] = Router
    """A layer of a few rows, from a weight of the activations' type, which takes rows as they are."""
    make_patches: Callable[[Tensor, Tensor], Patches] = TorchPatches
    """First layer of a ViT from a float32 weight and bias on the device."""
    ranks: Ranks = ALONE
    """Who shares the model's layers."""
    channel_unit: int = 1
    """Products are slow where the channels between two layers are no multiple of it, and zeros cost nothing."""
    leaves_out_biases: bool = False
    """Whether what layers add to a ViT's residual stream goes without their biases, whose sum the norms add that read
    it. A product that adds to something has no room for a bias on cards, and would take a launch more."""
    is_quantised: bool = False
    """Whether `make_linear` rounds weights further than `weight_dtype` does."""
    is_native: bool = False
    """Whether the native kernels do all that is heavy, and torch only moves small tensors."""

    def weight(self, tensor: Tensor) -> Tensor:
        """Own copy of a large matrix in the stored type, on the device."""
        return own_copy(tensor, self.device, self.weight_dtype)

    def vector(self, tensor: Tensor) -> Tensor:
        """Own copy of a norm's weight or of a bias, in the activations' type, on the device."""
        return tensor.to(self.device, self.activation_dtype, copy=True)

    def linear(self, weight: Matrix, bias: Tensor | None = None, *, epilogue: Epilogue = "none") -> Linear:
        """Linear layer of `weight` [N, K] and `bias` [N]."""
        return self.make_linear(weight, None if bias is None else self.vector(bias), epilogue)

    def unrounded(self, weight: Tensor) -> Linear:
        """Linear layer of a few decisive rows [N, K], which stay what they are where the others are quantised."""
        return self.make_unrounded(self.vector(weight))

    def experts(self, router: Tensor, gate_ups: Sequence[Matrix], downs: Sequence[Matrix], routing: Routing) -> Experts:
        """A mixture of experts; see `layers.experts.ExpertsFactory`."""
        make = self.make_experts or partial(looped_experts, self.make_linear)
        return make(self.vector(router), gate_ups, downs, routing)

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


def own_copy(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Of this type, on the device; on processors in huge pages."""
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
    from dashinfer_vlm.layers.card_backend import on_card, quantised_on_card  # which is made of this module's

    if quant_type != "none" and device.type == "cuda":
        return quantised_on_card(device, weight_dtype, quant_type)
    if quant_type != "none":
        return _quantised(device, weight_dtype, quant_type, store)
    if device.type == "cuda":
        why = cuda.why_unavailable()
        if why is None:
            return on_card(device, weight_dtype)
        logger.warning("no kernels for the card: %s; plain torch computes, many times slower", why)
    if device.type != "cpu":
        as_it_is = of_own_copies(TorchLinear, device, weight_dtype)
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
    make = of_own_copies(plain, device, weight_dtype)
    return Backend("torch", device, weight_dtype, torch.float32, REFERENCE, make)


def of_own_copies(
    linear_class: Callable[[Tensor, Tensor | None, Epilogue], _L], device: torch.device, dtype: torch.dtype
) -> Callable[[Matrix, Tensor | None, Epilogue], _L]:
    def make(weight: Matrix, bias: Tensor | None, epilogue: Epilogue) -> _L:
        tensor = weight.read()
        return linear_class(tensor if weight.is_kept else own_copy(tensor, device, dtype), bias, epilogue)

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
    return replace(_native(device, weight_dtype, layers, head), is_quantised=True)


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
