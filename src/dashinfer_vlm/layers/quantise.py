"""Weights that are rounded while they are loaded ("instant" quantisation), or found as a former start left them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedShape, PackedType, PackedWeight
from dashinfer_vlm.layers.activation import Epilogue
from dashinfer_vlm.layers.linear import Linear, Matrix, NativeLinear

__all__ = ["QUANT_TYPES", "PackedStore", "QuantisedLinears"]

QUANT_TYPES: dict[str, tuple[PackedType, PackedType]] = {
    "a8w8": ("int8", "int8"),
    "a16w8": ("int8 in groups", "int8 in groups"),
    "a16w4": ("int4", "int8 in groups"),  # 4 bits are too few for the head: its rounding is the logits' own error
}
"""How the linear layers and the head of the text model are rounded. `int8` rounds each row of the activations to 8 bits
as well; with the others activations keep what matters of their precision (`cpu_ops` says how much)."""


class PackedStore(Protocol):
    """Where packed weights of former starts may be found."""

    def find(self, name: str, shape: PackedShape) -> PackedWeight | None:
        """The weight `name` of one model, packed as `shape` says."""
        ...

    def keep(self, name: str, packed: PackedWeight) -> None:
        """Have it found the next time."""
        ...


@dataclass(frozen=True, slots=True)
class QuantisedLinears:
    """Makes linear layers with weights of one type; a `backend.LinearFactory`."""

    type: PackedType
    stored: torch.dtype
    """What the checkpoint's weights are rounded to first, as they would be without quantisation."""
    store: PackedStore | None

    def __call__(self, weight: Matrix, bias: torch.Tensor | None, epilogue: Epilogue) -> Linear:
        shape = self._shape(weight, gate_up=epilogue == "silu_mul")
        packed = self.store.find(weight.name, shape) if self.store else None
        if packed is None:
            packed = _pack(weight, shape, self.stored)
            if self.store:
                self.store.keep(weight.name, packed)
        return NativeLinear(packed, bias, epilogue)

    def _shape(self, weight: Matrix, *, gate_up: bool) -> PackedShape:
        kind, group_size = self.type, 0
        if self.type == "int8 in groups":
            group_size = 128
        elif self.type == "int4" and weight.nibbles is not None:
            kind, group_size = "int4 with zeros" if weight.nibbles.has_zeros else "int4", weight.nibbles.group
        elif self.type == "int4":
            group_size = 128 if weight.depth % 128 == 0 else 32
        return PackedShape(kind, weight.num_rows, weight.depth, group_size, gate_up)


def _pack(weight: Matrix, shape: PackedShape, dtype: torch.dtype) -> PackedWeight:
    """What is not in 4 bits already is first rounded to `dtype`."""
    if shape.type in ("int4", "int4 with zeros") and weight.nibbles is not None:
        return cpu_ops.pack_stored_int4(*weight.nibbles.read(), shape.group_size, gate_up=shape.gate_up)
    tensor = weight.read().to(dtype)
    if shape.type == "int4":
        return cpu_ops.pack_linear_int4(tensor, shape.group_size, gate_up=shape.gate_up)
    return cpu_ops.pack_linear_int8(tensor, shape.group_size, gate_up=shape.gate_up)
