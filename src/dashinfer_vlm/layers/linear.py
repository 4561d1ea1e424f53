"""Linear layers y = epilogue(x W^T + b) + residual. Which class holds a weight is decided once, by `Backend.linear`,
when the weight is prepared; a layer never looks back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn import functional as F

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.layers import onednn
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue

__all__ = [
    "ExpandingLinear",
    "Floats",
    "Linear",
    "Matrix",
    "NativeLinear",
    "Nibbles",
    "NormingLinear",
    "OneDnnLinear",
    "RowToNorm",
    "Stream",
    "StreamLinear",
    "TorchLinear",
    "Unsummed",
    "padded",
    "rows_of",
    "whole",
    "with_rows",
]

SCRATCH_ROWS = 1024
"""Weight rows that are expanded at a time: the scratch buffer stays in the last-level cache."""


@dataclass(frozen=True, slots=True)
class Floats:
    """A matrix of 8-bit floats."""

    numbers: torch.Tensor
    """float8_e4m3fn [N, K]."""
    scales: torch.Tensor
    """float32 [N, 1], or one for each block of 128 x 128, those at the lower and right edges cut off."""
    is_in_blocks: bool


@dataclass(frozen=True, slots=True)
class Nibbles:
    """A matrix that the checkpoint has in 4 bits: a weight is (number - zero) * scale."""

    group: int
    """Columns that share a scale: 32 or 128."""
    has_zeros: bool
    read: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    """Numbers, uint8 [N, K] below 16, scales, float32 [N, groups], and zeros, uint8 [N, groups], or None: all are 8."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [num_rows, depth] that is read when its numbers are needed; a packed copy makes that unnecessary."""

    name: str
    """Unique in its model."""
    num_rows: int
    depth: int
    read: Callable[[], torch.Tensor]
    """Gives [num_rows, depth], whose memory the next matrix may use again."""
    is_kept: bool = False
    """`read` gives memory on the device and in the stored type that stays: share it instead of copying."""
    read_floats: Callable[[], Floats] | None = None
    """The same as the checkpoint has it, where that is 8-bit floats; on the CPU."""
    nibbles: Nibbles | None = None
    """Likewise, where that is 4 bits."""


def padded(matrix: Matrix, *, parts: int = 1, rows: int | None = None, depth: int | None = None) -> Matrix:
    """`matrix`, of `parts` one above the other, with zeros below each part up to `rows` and behind each row up to
    `depth`."""
    rows, depth = rows or matrix.num_rows // parts, depth or matrix.depth
    more = (0, depth - matrix.depth, 0, rows - matrix.num_rows // parts)
    if not any(more):
        return matrix

    def read() -> torch.Tensor:
        return F.pad(matrix.read().reshape(parts, -1, matrix.depth), more).flatten(0, 1)

    return Matrix(matrix.name, parts * rows, depth, read)


def with_rows(matrix: Matrix, rows: torch.Tensor) -> Matrix:
    """`matrix` above more rows [n, depth], which may have another type."""

    def read() -> torch.Tensor:
        above = matrix.read()
        return torch.cat((above, rows.to(above.dtype)))

    return Matrix(matrix.name, matrix.num_rows + len(rows), matrix.depth, read)


class Linear(Protocol):
    """[T, K] -> [T, N] of x's dtype (N / 2 after `silu_mul`); `residual` [T, N] is added and not changed.

    The result is written to `out` [T, N] where one is given: not x's memory, but it may be the residual's."""

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@runtime_checkable
class NormingLinear(Protocol):
    """A `Linear` whose rows may come from `normed`."""

    def normed(self, x: Stream, weight: torch.Tensor, eps: float) -> Any:
        """RMSNorm of the rows, as this layer takes them in the fewest launches. Afterwards the rows are whole."""
        ...


@dataclass(frozen=True, slots=True)
class RowToNorm:
    """A row whose norm the product takes."""

    x: torch.Tensor
    """[1, K]."""
    weight: torch.Tensor
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype


@dataclass(frozen=True, slots=True)
class Unsummed:
    """Rows of a residual stream, and what is still to be added to them: a product whose columns several programs share
    leaves that to the norm that reads the rows next."""

    x: torch.Tensor
    """[T, N], where the sum goes."""
    parts: torch.Tensor
    """float32 [programs, T, N]."""


Stream = torch.Tensor | Unsummed
"""Rows of a residual stream [T, N]."""


def whole(x: Stream) -> torch.Tensor:
    """The rows, all that is to be added to them added."""
    return x.x.add_(x.parts.sum(0)) if isinstance(x, Unsummed) else x


def rows_of(x: Stream) -> torch.Tensor:
    """The rows of a stream that a norm has read: whole."""
    return x.x if isinstance(x, Unsummed) else x


class StreamLinear(Protocol):
    """As `Linear`, onto a residual stream, where `out` is its rows; they may be left unsummed then."""

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> Stream: ...


def _finish(
    y: torch.Tensor, epilogue: Epilogue, residual: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    y = EPILOGUES[epilogue](y)
    if residual is not None:
        y.add_(residual)
    return y if out is None else out.copy_(y)


class TorchLinear:
    """A weight [N, K] of the activations' dtype, used by torch as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: Epilogue) -> None:
        self.weight = weight
        self.bias = bias
        self.epilogue = epilogue

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if residual is not None and self.bias is None and self.epilogue == "none":
            return torch.addmm(residual, x, self.weight.t(), out=out)
        return _finish(F.linear(x, self.weight, self.bias), self.epilogue, residual, out)


class ExpandingLinear:
    """A 16-bit weight on a CPU without 16-bit arithmetic: expanded to float32 in pieces, then multiplied.

    torch's own 16-bit products are some ten times slower there, and a float32 copy would double the memory.
    """

    _scratch = torch.empty(0)  # shared by all layers
    _lock = threading.Lock()  # of the scratch: the layers of one model run one after the other, those of two do not

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: Epilogue) -> None:
        self.weight = weight
        self.bias = bias
        self.epilogue = epilogue
        num_elements = SCRATCH_ROWS * weight.shape[1]
        if ExpandingLinear._scratch.numel() < num_elements:
            ExpandingLinear._scratch = torch.empty(num_elements)

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        num_rows, width = self.weight.shape
        y = torch.empty(len(x), num_rows)
        with self._lock:
            for start in range(0, num_rows, SCRATCH_ROWS):
                piece = self.weight[start : start + SCRATCH_ROWS]
                wide = self._scratch[: piece.numel()].view(len(piece), width).copy_(piece)
                torch.mm(x, wide.t(), out=y[:, start : start + len(piece)])
        if self.bias is not None:
            y += self.bias
        return _finish(y, self.epilogue, residual, out)


class NativeLinear:
    """A weight in the native kernels' layout, whole or quantised; activations are float32."""

    def __init__(self, packed: cpu_ops.PackedWeight, bias: torch.Tensor | None, epilogue: Epilogue) -> None:
        assert packed.gate_up == (epilogue == "silu_mul"), (packed.shape, epilogue)
        self.packed = packed
        self.bias = bias
        self.epilogue = epilogue

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if residual is not None and self.epilogue == "none":
            return cpu_ops.linear(x, self.packed, self.bias, epilogue="residual", residual=residual, out=out)
        if residual is None:
            return cpu_ops.linear(x, self.packed, self.bias, epilogue=self.epilogue, out=out)
        y = cpu_ops.linear(x, self.packed, self.bias, epilogue=self.epilogue).add_(residual)
        return y if out is None else out.copy_(y)


class OneDnnLinear:
    """A weight in oneDNN's packed layout, for CPUs that multiply bfloat16 (AVX-512 or AMX)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: Epilogue) -> None:
        self.packed = onednn.pack(weight)
        self.bias = bias
        self.epilogue = epilogue

    def __call__(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if residual is not None and self.epilogue == "none":
            y = onednn.linear_add(x, self.packed, self.bias, residual)
            return y if out is None else out.copy_(y)
        return _finish(onednn.linear(x, self.packed, self.bias), self.epilogue, residual, out)
