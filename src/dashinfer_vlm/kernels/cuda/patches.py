"""The first layer of a ViT from bytes: exact in bfloat16, which a card multiplies fast; the float32 weight is the sum
of two bfloat16 halves, so that the product is as good as one of float32 numbers with 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels.cuda.launch import check, compute_type, launch

__all__ = ["embed_patches", "two_halves"]

DEPTH = 64
"""Columns of patches and weight that are multiplied at a time."""


@triton.jit(do_not_specialize=["num_rows"])
def _embed_patches(
    patches, halves, bias, out, num_rows, p_t, h_half, h_n, o_t, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = row.to(tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)
    for j in tl.range(0, K, BK):
        inside = (row < num_rows)[:, None] & (j + k < K)[None, :]
        x = tl.load(patches + at[:, None] * p_t + (j + k)[None, :], mask=inside, other=0).to(C)
        place = halves + column[None, :] * h_n + (j + k)[:, None]
        acc = tl.dot(x, tl.load(place, mask=(column < N)[None, :], other=0.0).to(C), acc)
        acc = tl.dot(x, tl.load(place + h_half, mask=(column < N)[None, :], other=0.0).to(C), acc)
    acc += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    inside = (row < num_rows)[:, None] & (column < N)[None, :]
    tl.store(out + at[:, None] * o_t + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


def two_halves(weight: Tensor) -> Tensor:
    """bfloat16 [2, N, K'] whose sum is float32 `weight` [N, K] to 16 bits; K' is K filled up with zeros for
    `embed_patches`."""
    high = weight.bfloat16()
    both = torch.stack((high, (weight - high.float()).bfloat16()))
    return F.pad(both, (0, -weight.shape[1] % DEPTH))


def embed_patches(patches: Tensor, halves: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 patches [P, K] times the weight of `two_halves`, plus float32 `bias` [N]; [P, N] of `dtype`."""
    num_rows, depth = patches.shape
    size = halves.shape[1]
    fits = patches.dtype == torch.uint8 and patches.stride(1) == 1 and 0 <= halves.shape[2] - depth < DEPTH
    check(fits and bias.shape == (size,), "patches must be uint8 [P, K] for a weight [2, N, K']", patches, halves, bias)
    out = torch.empty(num_rows, size, dtype=dtype, device=patches.device)
    rows, columns = 128, 128
    launch(
        _embed_patches, (-(-size // columns), -(-num_rows // rows)), patches, halves, bias, out, num_rows,
        patches.stride(0), *halves.stride()[:2], out.stride(0), depth, size, rows, columns, DEPTH,
        compute_type(torch.bfloat16), num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
