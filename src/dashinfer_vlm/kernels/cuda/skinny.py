"""Products of few rows, which are bound by reading the weight: of 16 bits, or of 8 or 4 with a scale per 128 columns.

The weight's rows are the tall side of a tile, as many as the card's product has; the rows of x are its narrow side. So
few bits become factors in registers, and 16 rows cost the arithmetic of 16. What comes after a product rides in it:
bias, SiLU times up, the residual. Where the weight has too few rows to keep a card busy, several programs share its
columns; the last of them to be done adds up what all have found, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from dashinfer_vlm.kernels.cuda import arrivals
from dashinfer_vlm.kernels.cuda.few_bits import of_bytes, of_high_halves, of_low_halves, shifts_of, sums_of_groups
from dashinfer_vlm.kernels.cuda.launch import (
    check,
    compute_type,
    has_tiles,
    is_roomy,
    launch,
    power_of_two,
)
from dashinfer_vlm.kernels.grouped import GROUP, GroupedWeight

__all__ = [
    "MOST_ROWS",
    "MOST_SHARED_ROWS",
    "MOST_WHOLE_ROWS",
    "TALL",
    "WIDE",
    "arrived_of",
    "can_multiply",
    "joined",
    "most_rows",
    "num_splits",
    "parts_of",
    "product",
    "splits_to_leave",
    "tile_of",
]

MOST_ROWS = 128
"""Beyond them arithmetic counts, and a weight of few bits is better expanded once."""
MOST_WHOLE_ROWS, MOST_SHARED_ROWS = 64, 16
"""The same of 16 bits, where cuBLAS is as quick from there on. The first of a weight whose rows keep a card busy, the
second of one whose columns are shared: what its programs find grows with the rows of x."""
TALL, WIDE = 64, 64
"""Rows of the weight of a tile, and of x at the most."""
WANTED_PROGRAMS = 264
"""Two for each multiprocessor of a large card."""
LEAST_ROUNDS = 3
"""Of a split: adding it up costs as much as reading them."""


@triton.jit
def joined(acc, parts, arrived, SPLITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Whether this program is the last of those that share its tile; what all have found, in their order, if so."""
    tile = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    places = (tl.arange(0, BN) * BM)[:, None] + tl.arange(0, BM)[None, :]
    places = parts + tile.to(tl.int64) * (SPLITS * BN * BM) + places
    tl.store(places + tl.program_id(2) * (BN * BM), acc)
    tl.debug_barrier()  # all of it is written before it is said
    is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(arrived + tile, 0)  # for the next launch
        acc = tl.zeros([BN, BM], tl.float32)
        for j in tl.static_range(SPLITS):
            acc += tl.load(places + j * (BN * BM), cache_modifier=".cg")
    return is_last, acc


@triton.jit
def tile_of(x, first, at, x_t, SIZE, K, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILED: tl.constexpr):
    """[HEIGHT, WIDTH] of [SIZE, K], zeros where there is nothing."""
    if TILED:
        tile = x.load([first, at])
    else:
        i = first + tl.arange(0, HEIGHT)
        k = at + tl.arange(0, WIDTH)
        places = x + i.to(tl.int64)[:, None] * x_t + k[None, :]
        tile = tl.load(places, mask=(i < SIZE)[:, None] & (k < K)[None, :], other=0.0)
    return tile


@triton.jit
def _add(acc, w, low, high, scale, shift, sums, BITS: tl.constexpr, SHIFTED: tl.constexpr, C: tl.constexpr):
    """`acc` [BN, BM] and what a tile of the weight adds, of few bits `scale` [BN] times, to which `shift` [BN] is added
    before, which meets the `sums` [BM] of x. `low` and `high` are the halves of x that 4 bits meet, else the same."""
    if BITS == 16:
        acc = tl.dot(w.to(C), low, acc, input_precision="ieee")
    elif BITS == 8:
        acc += tl.dot(of_bytes(w, C), low, input_precision="ieee") * scale[:, None]
    else:
        part = tl.dot(of_low_halves(w, C), low, input_precision="ieee")
        part = tl.dot(of_high_halves(w, C), high, part, input_precision="ieee")
        if SHIFTED:
            part += shift[:, None] * sums[None, :]
        acc += part * scale[:, None]
    return acc


@triton.jit(do_not_specialize=["T"])
def _multiply(
    out, x, w, scales, shifts, of_groups, bias, residual, parts, arrived, T, x_t, w_n, s_n, r_t, o_t, N: tl.constexpr,
    K: tl.constexpr, SPLITS: tl.constexpr, JOIN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BITS: tl.constexpr, SHIFTED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    TILED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`x` and `w` are descriptors of tiles with `TILED`, else pointers. With `GATED` the weight has 16 bits. Without
    `JOIN`, splits leave their parts in `out` [SPLITS, T, N]."""
    first_n = tl.program_id(0) * BN
    first_m = tl.program_id(1) * BM
    n = first_n + tl.arange(0, BN)
    m = first_m + tl.arange(0, BM)
    rounds: tl.constexpr = (K + BK - 1) // BK
    each: tl.constexpr = (rounds + SPLITS - 1) // SPLITS
    start = tl.program_id(2) * each
    stop = tl.minimum(start + each, rounds)
    acc = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32)
    of_row = tl.minimum(n, N - 1).to(tl.int64) * s_n
    scale = tl.load(scales + of_row + start).to(tl.float32) if BITS < 16 else tl.full([BN], 0, tl.float32)
    shift = tl.load(shifts + of_row + start).to(tl.float32) if SHIFTED else scale
    sums = tl.load(of_groups + start * T + m, mask=m < T, other=0.0) if SHIFTED else tl.full([BM], 0, tl.float32)
    width: tl.constexpr = BK // 2 if BITS == 4 else BK  # of what a row of the weight has for a round
    length: tl.constexpr = (K + 127) // 128 * 64 if BITS == 4 else K
    rows_of_w: tl.constexpr = 2 * N if GATED else N
    for i in tl.range(start, stop):
        low = tile_of(x, first_m, i * BK, x_t, T, K, BM, width, TILED).to(C).T
        high = low
        if BITS == 4:
            high = tile_of(x, first_m, i * BK + width, x_t, T, K, BM, width, TILED).to(C).T
        next_scale = scale
        next_shift = shift
        next_sums = sums
        following = tl.minimum(i + 1, stop - 1)
        if BITS < 16:  # scales are asked for a round before they are needed
            next_scale = tl.load(scales + of_row + following).to(tl.float32)
        if SHIFTED:
            next_shift = tl.load(shifts + of_row + following).to(tl.float32)
            next_sums = tl.load(of_groups + following * T + m, mask=m < T, other=0.0)
        tile = tile_of(w, first_n, i * width, w_n, rows_of_w, length, BN, width, TILED)
        acc = _add(acc, tile, low, high, scale, shift, sums, BITS, SHIFTED, C)
        if GATED:
            tile = tile_of(w, first_n + N, i * width, w_n, rows_of_w, length, BN, width, TILED)
            up = _add(up, tile, low, high, scale, shift, sums, BITS, SHIFTED, C)
        scale = next_scale
        shift = next_shift
        sums = next_sums
    inside = (n < N)[:, None] & (m < T)[None, :]
    if JOIN:
        is_last, acc = joined(acc, parts, arrived, SPLITS, BN, BM)
        inside &= is_last
    elif SPLITS > 1:
        out += tl.program_id(2).to(tl.int64) * T * N
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc = acc / (1 + tl.exp(-acc)) * up
    if RESIDUAL:
        acc += tl.load(residual + m.to(tl.int64)[None, :] * r_t + n[:, None], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64)[None, :] * o_t + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is divided."""

    rows: int
    """Of x."""
    columns: int
    stages: int


def cut_for(num_rows: int, num_tiles: int, bits: int, *, is_gated: bool, is_roomy: bool) -> Cut:
    """The fastest of some on an H200 (docs/log.md). Without `is_roomy`, what most cards have shared memory for."""
    rows = power_of_two(min(num_rows, WIDE), 16)
    if bits < 16:
        return Cut(rows, GROUP, 4)
    if not is_roomy:
        return Cut(rows, 64, 3 if is_gated else 4)
    if not is_gated and num_tiles < 132:  # with 64 rows a program has a multiprocessor to itself
        return Cut(rows, 128, 6 if rows == WIDE else 4)
    if not is_gated:
        return Cut(rows, 128, 3)
    if rows <= 32 and num_tiles <= WANTED_PROGRAMS:
        return Cut(rows, 128, 3)
    return Cut(rows, 64, 4 if num_tiles <= WANTED_PROGRAMS or rows <= 32 else 3)


def num_splits(num_programs: int, num_rounds: int, wanted_programs: int | None = None) -> int:
    """So many that `num_programs` times it fill a card; every split has some rounds."""
    wanted_programs = WANTED_PROGRAMS if wanted_programs is None else wanted_programs
    wanted = max(1, min(wanted_programs // max(num_programs, 1), num_rounds // LEAST_ROUNDS))
    return -(-num_rounds // -(-num_rounds // wanted))


def arrived_of(weight: Tensor) -> Tensor:
    """For `joined`: a counter for each tile of this weight's products."""
    return arrivals.arrived_of(weight, -(-len(weight) // TALL) * -(-MOST_ROWS // 16))


def most_rows(weight: Tensor, *, silu_mul: bool) -> int:
    """Rows of x for which `product` is the one for this weight of 16 bits; 0 for none, as on cards without an engine
    that copies tiles."""
    if weight.itemsize != 2 or not can_multiply(weight) or not has_tiles(weight):
        return 0
    num_tiles = -(-(len(weight) // 2 if silu_mul else len(weight)) // TALL)
    if 2 * num_tiles > WANTED_PROGRAMS:
        return MOST_WHOLE_ROWS
    return 0 if silu_mul else MOST_SHARED_ROWS


def can_multiply(x: Tensor) -> bool:
    """Whether rows begin where the copy engine can read them: at multiples of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def product(
    x: Tensor,
    weight: GroupedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    silu_mul: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """[T, N] of `dtype`, else of x's (N / 2 with `silu_mul`): x [T, K] times the weight, transposed, plus a bias [N];
    then SiLU of the first half times the second, where the weight has 16 bits; then plus `residual`, whose memory `out`
    may be.

    `splits` is how many programs share the columns of a row of the weight, without `silu_mul`; None chooses. No two
    products of one weight may be under way at a time. Raises ValueError for shapes that do not fit, and for rows of the
    weight that `can_multiply` does not take.
    """
    if isinstance(weight, Tensor):
        numbers, scales, shifts, bits, total = weight, weight, None, 16, weight.shape[1]
    else:
        numbers, scales, bits, total = weight.numbers, weight.scales, weight.bits, weight.depth
        shifts = None if weight.shifts is None else shifts_of(weight)
    num_rows, depth = x.shape
    size = len(numbers) // 2 if silu_mul else len(numbers)
    check(depth == total, f"the weight has {total} columns", x)
    check(not silu_mul or (bits == 16 and splits in (None, 1)), "SiLU rides in whole products of 16 bits", numbers)
    check(can_multiply(numbers), "rows of the weight must be dense and begin at multiples of 16 bytes", numbers)
    check(residual is None or residual.shape == (num_rows, size), "the residual must fit the result", x, *(
        () if residual is None else (residual,)))  # fmt: skip
    x = x if can_multiply(x) else F.pad(x, (0, -depth % 8))
    cut, grid = _cut(x, size, bits, is_gated=silu_mul)
    if splits is None:
        splits = 1 if silu_mul else num_splits(grid[0] * grid[1], -(-depth // cut.columns))
    if out is None:
        out = torch.empty(num_rows, size, dtype=dtype or x.dtype, device=x.device)
    parts = arrived = out  # where nothing is split, not looked at
    if splits > 1:
        shape = (grid[0] * grid[1], splits, TALL, cut.rows)
        parts, arrived = torch.empty(shape, dtype=torch.float32, device=x.device), arrived_of(numbers)
    _start(
        out, x, numbers, scales, shifts, bias, residual, parts, arrived, cut, (*grid, splits), bits=bits,
        joins=splits > 1, is_gated=silu_mul,
    )  # fmt: skip
    return out


def parts_of(x: Tensor, weight: Tensor, splits: int) -> Tensor:
    """float32 [splits, T, N], whose sum is `product` of x [T, K] and a weight of 16 bits [N, K]: left to whoever reads
    it next. See there."""
    check(x.shape[1] == weight.shape[1] and can_multiply(x) and can_multiply(weight), "rows must begin at multiples of "
          "16 bytes and be as long as those of the weight", x, weight)  # fmt: skip
    cut, grid = _cut(x, len(weight), 16, is_gated=False)
    out = torch.empty(splits, len(x), len(weight), dtype=torch.float32, device=x.device)
    _start(out, x, weight, out, None, None, None, out, out, cut, (*grid, splits), bits=16, joins=False, is_gated=False)
    return out


def splits_to_leave(num_rows: int, weight: Tensor) -> int:
    """Of `parts_of`, for so many rows: as many as of `product`, but fewer for more rows, whose parts are longer."""
    num_tiles, depth = -(-len(weight) // TALL), weight.shape[1]
    wanted = WANTED_PROGRAMS if num_rows <= MOST_SHARED_ROWS else WANTED_PROGRAMS // 2
    return num_splits(num_tiles, -(-depth // 128), wanted)


def _cut(x: Tensor, size: int, bits: int, *, is_gated: bool) -> tuple[Cut, tuple[int, int]]:
    num_tiles = -(-size // TALL)
    cut = cut_for(len(x), num_tiles, bits, is_gated=is_gated, is_roomy=is_roomy(x))
    return cut, (num_tiles, -(-len(x) // cut.rows))


def _start(
    out: Tensor,
    x: Tensor,
    numbers: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    parts: Tensor,
    arrived: Tensor,
    cut: Cut,
    grid: tuple[int, int, int],
    *,
    bits: int,
    joins: bool,
    is_gated: bool,
) -> None:
    width = cut.columns // 2 if bits == 4 else cut.columns  # of 4 bits, two halves of x meet those of a byte
    factors: tuple[Any, Any] = (x, numbers)
    is_tiled = has_tiles(x)
    if is_tiled:
        factors = tuple(map(TensorDescriptor.from_tensor, factors, ([cut.rows, width], [TALL, width])))
    launch(
        _multiply, grid, out, *factors, scales, out if shifts is None else shifts,
        out if shifts is None else sums_of_groups(x), out if bias is None else bias,
        out if residual is None else residual, parts, arrived, len(x), x.stride(0), numbers.stride(0), scales.stride(0),
        0 if residual is None else residual.stride(0), out.stride(-2), out.shape[-1], x.shape[1], grid[2], joins, TALL,
        cut.rows, cut.columns, bits, shifts is not None, bias is not None, is_gated, residual is not None, is_tiled,
        compute_type(x.dtype), num_warps=4, num_stages=cut.stages,
    )  # fmt: skip
