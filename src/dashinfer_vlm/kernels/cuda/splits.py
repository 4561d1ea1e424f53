"""Programs that share the keys of a tile: what each of them takes, and how what they find is joined."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import launch, power_of_two, starts_early, wait_for_last

__all__ = ["join", "num_splits", "parts_of", "share_of"]


def num_splits(wanted: int, num_programs: int, max_context: int, keys: int) -> int:
    """A power of two, so that `num_programs` times it are at most `wanted`, and every split has a tile of `keys`."""
    wanted = min(wanted // max(num_programs, 1), max_context // keys, 64)
    return power_of_two(wanted + 1) // 2 if wanted > 1 else 1


@triton.jit
def share_of(context, BN: tl.constexpr, SPLITS: tl.constexpr):
    """Keys that each of the programs takes that share a tile, in whole rounds; the last ones may find none left."""
    return tl.cdiv(tl.cdiv(context, BN), SPLITS) * BN


@triton.jit
def _owner_of(starts, row, num_sequences):
    """The sequence of a row; the number of sequences where nobody owns it."""
    s = 0
    for j in tl.range(0, num_sequences, 128):
        i = j + tl.arange(0, 128)
        inside = i < num_sequences
        s += tl.sum((inside & (tl.load(starts + i + 1, mask=inside, other=0) <= row)).to(tl.int32), 0)
    return s


@triton.jit(do_not_specialize=["num_sequences", "l_split"])
def _combine(
    parts, lse, starts, contexts, out, num_sequences, p_split, p_t, p_h, l_split, l_t, o_t, o_h, D: tl.constexpr,
    DP: tl.constexpr, SPLITS: tl.constexpr, FEW: tl.constexpr, FEW_KEYS: tl.constexpr, MANY_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row and head by their shares of the softmax's sum: of those splits whose keys it sees."""
    head = tl.program_id(1)
    s = tl.program_id(0) if FEW == 1 else _owner_of(starts, tl.program_id(0), num_sequences)
    first = tl.load(starts + s)
    n = tl.load(starts + tl.minimum(s + 1, num_sequences)) - first
    context = tl.load(contexts + tl.minimum(s, num_sequences - 1))
    wait_for_last(EARLY)
    if n == 0:
        return
    at = first if FEW == 1 else tl.program_id(0)
    share = share_of(context, FEW_KEYS, SPLITS) if n <= FEW else share_of(context, MANY_KEYS, SPLITS)
    i = tl.arange(0, SPLITS)
    d = tl.arange(0, DP)
    seen = i * share <= context - n + at - first
    sums = tl.load(lse + i * l_split + at * l_t + head, mask=seen, other=-float("inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    weights = weights / tl.sum(weights, 0)
    place = parts + i[:, None] * p_split + at * p_t + head * p_h + d[None, :]
    x = tl.load(place, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    joined = tl.sum(x * weights[:, None], 0)
    tl.store(out + at.to(tl.int64) * o_t + head * o_h + d, joined.to(out.dtype.element_ty), mask=d < D)


def parts_of(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where programs leave what they found for [T, H, D] `out`: weighted values [splits, T, H, D] and logarithms of
    sums [splits, T, H], both float32, for `join`; where nothing is split, `out` itself."""
    if splits == 1:
        return out[None], out[None, ..., 0]
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    return parts, torch.empty(parts.shape[:3], dtype=torch.float32, device=out.device)


def join(
    parts: Tensor, lse: Tensor, starts: Tensor, contexts: Tensor, out: Tensor, few: int, few_keys: int, many_keys: int
) -> None:
    """`out` from `parts_of` it; tiles of sequences of at most `few` rows had `few_keys`, others `many_keys`. With
    `few` 1 every sequence has one row or none."""
    splits, num_rows, num_heads, dim = parts.shape
    early = len(out) == 1 and starts_early(out)
    launch(
        _combine, (num_rows, num_heads), parts, lse, starts, contexts, out, len(contexts), *parts.stride()[:3],
        *lse.stride()[:2], *out.stride()[:2], dim, power_of_two(dim), splits, few, few_keys, many_keys, early,
        num_warps=4, early=early,
    )  # fmt: skip
