"""The causal convolution in front of a gated delta net: queries and keys come out of it with length 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.launch import Tile, launch, power_of_two, starts_early, wait_for_last
from dashinfer_vlm.kernels.cuda.paged import tile_of
from dashinfer_vlm.kernels.delta_net import DeltaNet

__all__ = ["causal_conv"]

TILE = Tile(16, 128, 4, 1)
"""Rows of prompts; columns are a head's."""
REMEMBERED = 1024
"""Channels that a program remembers."""
MOST_EARLY = 64
"""Rows of a step of decode up to which a kernel starts before the last one has ended."""


@triton.jit(do_not_specialize=["num_sequences"])
def _conv(
    x, inputs, weight, seats, starts, contexts, out, num_sequences, x_t, i_s, o_t, HK: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, B: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, DECODE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The channels of a head in rows of one sequence. With `DECODE` these are its only rows, and the inputs that it
    goes on from next time are written, too."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    if DECODE:
        s = tile
        local = 0
    else:
        s, local = tile_of(starts, tile, num_sequences, BR, 0, True)
    first = tl.load(starts + s)
    n = tl.load(starts + tl.minimum(s + 1, num_sequences)) - first
    context = tl.load(contexts + tl.minimum(s, num_sequences - 1))
    seat = tl.load(seats + tl.minimum(s, num_sequences - 1))
    wait_for_last(EARLY)
    if local >= n:
        return
    channel = tl.where(head < 2 * HK, head * K, 2 * HK * K + (head - 2 * HK) * V)
    b = tl.arange(0, B)
    inside = (b < tl.where(head < 2 * HK, K, V))[None, :]
    c = channel + b
    r = local + tl.arange(0, BR)
    total = tl.zeros([BR, B], tl.float32)
    for tap in tl.static_range(TAPS):
        back = r + tap - (TAPS - 1)
        kept = inputs + seat * i_s + (back + TAPS - 1)[:, None] * C + c[None, :]
        is_row = ((back >= 0) & (r < n))[:, None] & inside
        is_kept = ((back < 0) & (r < n) & (context > n))[:, None] & inside
        z = tl.load(x + (first + back).to(tl.int64)[:, None] * x_t + c[None, :], mask=is_row, other=0.0).to(tl.float32)
        z += tl.load(kept, mask=is_kept, other=0.0)
        total += z * tl.load(weight + tap * C + c, mask=b < tl.where(head < 2 * HK, K, V), other=0.0)[None, :]
        if DECODE and tap > 0:  # one place further back than it was read
            tl.store(inputs + seat * i_s + (tap - 1) * C + c[None, :], z, mask=inside)
    y = total / (1 + tl.exp(-total))
    scale = tl.rsqrt(tl.sum(y * y, 1) + 1e-6) * tl.where(head < HK, K**-0.5, 1.0)
    y *= tl.where(head < 2 * HK, scale, 1.0)[:, None]
    place = out + (first + r).to(tl.int64)[:, None] * o_t + c[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(r < n)[:, None] & inside)


@triton.jit
def _remember(
    x, inputs, seats, starts, contexts, x_t, i_s, TAPS: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """The last inputs of a sequence, once all of its rows have read those before."""
    s = tl.program_id(0)
    c = tl.program_id(1) * B + tl.arange(0, B)
    first = tl.load(starts + s)
    n = tl.load(starts + s + 1) - first
    if n == 0:
        return
    is_old = tl.load(contexts + s) > n
    kept = inputs + tl.load(seats + s) * i_s + c
    for place in tl.static_range(TAPS - 1):
        back = n - (TAPS - 1) + place
        z = tl.load(x + (first + back).to(tl.int64) * x_t + c, mask=(back >= 0) & (c < C), other=0.0).to(tl.float32)
        z += tl.load(kept + (back + TAPS - 1) * C, mask=(back < 0) & is_old & (c < C), other=0.0)
        tl.store(kept + place * C, z, mask=c < C)


def causal_conv(
    x: Tensor,
    inputs: Tensor,
    net: DeltaNet,
    seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """`layers.delta_net.causal_conv` of x [T, C] in x's type, rows may be strided; queries and keys with length 1, the
    queries over the root of `key_dim`. Rows that no sequence owns are neither read nor written."""
    (num_rows, num_channels), num_sequences = x.shape, len(context_lens)
    is_decode = num_rows == num_sequences
    early = is_decode and num_rows <= MOST_EARLY and starts_early(x)
    rows = 1 if is_decode else TILE.rows
    tiles = num_rows if is_decode else num_rows // rows + min(num_sequences, num_rows)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = (net.num_key_heads, net.key_dim, net.value_dim, power_of_two(max(net.key_dim, net.value_dim)))
    where, taps = (seats, query_starts, context_lens), len(net.conv)
    launch(
        _conv, (tiles, 2 * net.num_key_heads + net.num_value_heads), x, inputs, net.conv, *where, out, num_sequences,
        x.stride(0), inputs.stride(0), out.stride(0), *sizes, taps, num_channels, rows, is_decode, early,
        num_warps=1 if is_decode else TILE.warps, early=early,
    )  # fmt: skip
    if not is_decode:
        launch(
            _remember, (num_sequences, -(-num_channels // REMEMBERED)), x, inputs, *where, x.stride(0),
            inputs.stride(0), taps, num_channels, REMEMBERED, num_warps=4,
        )  # fmt: skip
    return out
