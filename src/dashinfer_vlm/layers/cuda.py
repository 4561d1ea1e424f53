"""The layers on NVIDIA cards: the kernels of `kernels/cuda` around products by cuBLAS. Imports triton, so it is
imported by `backend` alone, when a card is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels.cuda import (
    decode,
    delta_net,
    experts,
    few_bits,
    fp8,
    gemv,
    narrow,
    paged,
    rotary,
    rows,
    segments,
    skinny,
    skinny_floats,
)
from dashinfer_vlm.kernels.grouped import GroupedWeight
from dashinfer_vlm.layers.activation import EPILOGUES, Epilogue
from dashinfer_vlm.layers.experts import Router, Routing
from dashinfer_vlm.layers.fp8 import Fp8Ops
from dashinfer_vlm.layers.grouped import GroupedOps
from dashinfer_vlm.layers.linear import Linear, RowToNorm, Stream, Unsummed
from dashinfer_vlm.layers.ops import Ops

__all__ = [
    "FP8_OPS",
    "OPS",
    "CudaExperts",
    "CudaHead",
    "CudaLinear",
    "CudaPatches",
    "CudaRouter",
    "CudaStreamLinear",
    "grouped_ops",
    "multiplies_into_float32",
    "two_halves",
]

OPS = Ops(
    embed=rows.embed,
    rms_norm=rows.rms_norm,
    layer_norm=rows.layer_norm,
    mrope_cos_sin=rotary.mrope_cos_sin,
    rope=rotary.rope,
    rope_write_kv=rotary.rope_write_kv,
    paged_attention=paged.paged_attention,
    varlen_attention=segments.varlen_attention,
    rope_and_attend=decode.rope_and_attend,
    sigmoid_mul=rows.sigmoid_mul,
    whole_delta_net=delta_net.delta_net,
)

_EPILOGUES = {**EPILOGUES, "silu_mul": rows.silu_mul, "quick_gelu": rows.quick_gelu}
"""One launch each: torch's GELU is one already."""


_UNIT = 8
"""Numbers of 16 bits: rows of a product begin at multiples of 16 bytes."""
_PATCHES_AT_ONCE = 8192
"""They stand in memory in four times their bytes, meanwhile."""

_RIDING: tuple[Epilogue, ...] = ("none", "silu_mul")
"""Those that ride in products of a row and of few."""

FP8_OPS = Fp8Ops(
    fp8.quantise,
    fp8.block_product,
    fp8.rms_norm,
    fp8.silu_mul,
    _EPILOGUES,
    skinny_floats.product,
    skinny_floats.MOST_ROWS,
    unit=16,
)


class CudaLinear:
    """A weight [N, K] of the activations' dtype. A row by itself is one launch, with all that surrounds the product;
    few rows are one with all that comes after it. Of many, the residual rides in cuBLAS's product, and the epilogue is
    one launch."""

    def __init__(self, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
        self.weight = weight
        self.bias = bias
        self.epilogue = epilogue
        self.most_few = skinny.most_rows(weight, silu_mul=epilogue == "silu_mul") if epilogue in _RIDING else 0

    def normed(self, x: Stream, weight: Tensor, eps: float) -> Tensor | RowToNorm:
        """See `layers.linear.NormingLinear`."""
        if isinstance(x, Unsummed):
            return rows.add_rms_norm(x.x, x.parts, weight, eps)
        if len(x) == 1 and x.shape[1] <= gemv.MOST_NORMED:
            return RowToNorm(x, weight, eps)
        return rows.rms_norm(x, weight, eps)

    def __call__(self, x: Tensor | RowToNorm, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if isinstance(x, RowToNorm):
            return self._row_times(x.x, residual, out, x.weight, x.eps)
        if len(x) == 1 and self.epilogue in _RIDING:
            return self._row_times(x, residual, out)
        if 1 < len(x) <= self.most_few:
            is_gated = self.epilogue == "silu_mul"
            return skinny.product(x, self.weight, self.bias, silu_mul=is_gated, residual=residual, out=out)
        if self.epilogue == "none":
            return self._product(x, residual, out)
        y = _EPILOGUES[self.epilogue](F.linear(x, self.weight, self.bias))
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)

    def _row_times(
        self, x: Tensor, residual: Tensor | None, out: Tensor | None, gains: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        return gemv.product(
            x, self.weight, self.bias, gains=gains, eps=eps, silu_mul=self.epilogue == "silu_mul", residual=residual,
            out=out,
        )  # fmt: skip

    def _product(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        weight_t = self.weight.t()
        if residual is not None and self.bias is not None:
            return torch.add(torch.addmm(self.bias, x, weight_t), residual, out=out)
        if residual is not None:  # copied by torch where `out` is not its own memory
            return torch.addmm(residual, x, weight_t, out=out)
        if self.bias is not None:
            return torch.addmm(self.bias, x, weight_t, out=out)
        return torch.mm(x, weight_t, out=out)


class CudaStreamLinear:
    """As `CudaLinear`, onto a residual stream: of few rows, what programs that share the columns find is summed by the
    norm behind, in a launch that there is anyway."""

    def __init__(self, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
        self.plain = CudaLinear(weight, bias, epilogue)
        can_leave = bias is None and epilogue == "none" and self.plain.most_few > 0
        self.most_left = skinny.MOST_WHOLE_ROWS if can_leave else 0

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Stream:
        if residual is not None and residual is out and 1 < len(x) <= self.most_left:
            weight = self.plain.weight
            splits = skinny.splits_to_leave(len(x), weight)
            if splits > 1:
                return Unsummed(residual, skinny.parts_of(x, weight, splits))
        return self.plain(x, residual=residual, out=out)


class _NormingWhole:
    """See `layers.linear.NormingLinear`: rows are normed in a launch of their own, which sums the parts of few, too."""

    def normed(self, x: Stream, weight: Tensor, eps: float) -> Tensor:
        if isinstance(x, Unsummed):
            return rows.add_rms_norm(x.x, x.parts, weight, eps)
        return rows.rms_norm(x, weight, eps)


class CudaHead(_NormingWhole):
    """As `CudaLinear`, to float32 logits: those of 16 bits tie where the sums behind them do not."""

    def __init__(self, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
        assert bias is None, "a head adds nothing"
        assert epilogue == "none", epilogue
        self.weight = weight

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        assert residual is None, "a head adds nothing"
        if out is None:
            out = torch.empty(len(x), len(self.weight), dtype=torch.float32, device=x.device)
        if x.dtype == torch.float32:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)


def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the product that `CudaHead` needs: from 2.8 on, and for 16 bits on cards alone."""
    return dtype == torch.float32 or (device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out"))


def grouped_ops(head: Callable[[Tensor, Tensor | None, Epilogue], Linear]) -> GroupedOps:
    """`head` is the class of whole heads."""

    def few(
        x: Tensor | RowToNorm,
        weight: GroupedWeight,
        bias: Tensor | None,
        silu_mul: bool,
        residual: Tensor | None,
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> Tensor:
        if isinstance(x, RowToNorm):
            return narrow.of_groups(
                x.x, weight, bias, gains=x.weight, eps=x.eps, silu_mul=silu_mul, residual=residual, dtype=dtype, out=out
            )
        if len(x) == 1:
            return narrow.of_groups(x, weight, bias, silu_mul=silu_mul, residual=residual, dtype=dtype, out=out)
        if not silu_mul:
            return skinny.product(x, weight, bias, residual=residual, dtype=dtype, out=out)
        y = rows.silu_mul(skinny.product(x, weight, bias, dtype=dtype))
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)

    return GroupedOps(few, skinny.MOST_ROWS, gemv.MOST_NORMED, rows.rms_norm, few_bits.expand, CudaLinear, head)


class CudaRouter(_NormingWhole, Router):
    """Of whole rows, which come from the stream. Its own rows begin at multiples of 16 bytes: for others cuBLAS takes
    several times as long."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(F.pad(weight, (0, 0, 0, -len(weight) % _UNIT)))
        self.num_rows = len(weight)

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = super().__call__(x, residual=residual)[:, : self.num_rows]
        return y if out is None else out.copy_(y)


class CudaExperts:
    """See `layers.experts.Experts`. `multiply` is that of `experts`, `experts_floats` or `experts_grouped` in
    `kernels.cuda`, its weights given."""

    def __init__(self, router: Tensor, multiply: Callable[..., Tensor], routing: Routing) -> None:
        self.router = CudaRouter(router)
        self.multiply = multiply
        self.routing = routing

    def __call__(self, x: Tensor, *, residual: Tensor | None) -> Tensor:
        logits, routing = self.router(x), self.routing
        chosen, shares = experts.choose(
            logits, routing.count, normalise=routing.is_normalised, has_shared=routing.has_shared
        )
        out = torch.zeros_like(x) if residual is None else residual
        return self.multiply(x, chosen=chosen, shares=shares, residual=out, out=out)


class CudaPatches:
    """`layers.patches.TorchPatches` in bfloat16, which holds bytes exactly: the weight is the sum of two halves, so
    that the product is as good as one of float32 numbers with 16 bits. Both halves stand side by side in one product,
    and behind them the bias, which ones are multiplied with."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight_t = torch.cat((*two_halves(weight), F.pad(two_halves(bias).t(), (0, _UNIT - 2))), dim=1).t()

    def __call__(self, patches: Tensor) -> Tensor:
        """uint8 [P, K] -> float32 [P, N]."""
        out = torch.empty(len(patches), self.weight_t.shape[1], device=patches.device)
        for start in range(0, len(patches), _PATCHES_AT_ONCE):
            rows = slice(start, start + _PATCHES_AT_ONCE)
            x = F.pad(patches[rows].bfloat16().repeat(1, 2), (0, _UNIT), value=1.0)
            if x.is_cuda:
                torch.mm(x, self.weight_t, out_dtype=torch.float32, out=out[rows])
            else:  # the same numbers, which torch multiplies into float32 on cards alone
                torch.mm(x.float(), self.weight_t.float(), out=out[rows])
        return out


def two_halves(x: Tensor) -> Tensor:
    """bfloat16 [2, ...] whose sum is float32 `x` to 16 bits."""
    high = x.bfloat16()
    return torch.stack((high, (x - high.float()).bfloat16()))
