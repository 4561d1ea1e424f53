"""Gated delta nets (Yang, Kautz and Hatamizadeh 2024), driven by what lies on the device: no length is read back.

The only row of a sequence has each head's memory in registers, which is read once and written once. More rows are cut
into chunks (`delta_chunks.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.cuda.causal_conv import MOST_EARLY, causal_conv
from dashinfer_vlm.kernels.cuda.delta_chunks import by_chunks, gated, rates_of
from dashinfer_vlm.kernels.cuda.launch import check, launch, power_of_two, starts_early, wait_for_last
from dashinfer_vlm.kernels.delta_net import DeltaNet

__all__ = ["delta_net"]

REGISTERS = 128
"""Of a thread at the most: so two programs fit a multiprocessor, with half of a memory of 64 KiB each under way."""


@triton.jit
def _one_row(
    mixed, gate, rates, speed, bias, gains, eps, memory, seats, starts, contexts, out, m_t, g_t, r_t, o_t, s_s,
    HK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A head of a sequence of one row."""
    s = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(starts + s)
    n = tl.load(starts + s + 1) - first
    is_old = tl.load(contexts + s) > n
    key = head // (H // HK)
    i = tl.arange(0, KP)
    j = tl.arange(0, VP)
    inside = (i < K)[:, None] & (j < V)[None, :]
    place = memory + tl.load(seats + s) * s_s + head * (K * V) + i[:, None] * V + j[None, :]
    state = tl.load(place, mask=inside & is_old & (n == 1), other=0.0)  # of the last step: nothing to wait for
    w = tl.load(gains + j, mask=j < V, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    if n != 1:
        return
    at = first.to(tl.int64)
    row = mixed + at * m_t
    q = tl.load(row + key * K + i, mask=i < K, other=0.0).to(tl.float32)
    k = tl.load(row + (HK + key) * K + i, mask=i < K, other=0.0).to(tl.float32)
    v = tl.load(row + 2 * HK * K + head * V + j, mask=j < V, other=0.0).to(tl.float32)
    z = tl.load(gate + at * g_t + head * V + j, mask=j < V, other=0.0).to(tl.float32)
    beta, decay = rates_of(rates + at * r_t + head, speed + head, bias + head, H, True)
    kept = tl.exp(decay)
    change = beta * (v - tl.sum(state * k[:, None], 0) * kept)
    found = tl.sum(state * q[:, None], 0) * kept + tl.sum(q * k, 0) * change  # in the memory that is to be
    tl.store(place, state * kept + k[:, None] * change[None, :], mask=inside)
    y = gated(found, z, w, eps, out.dtype.element_ty, V, 0)
    tl.store(out + at * o_t + head * V + j, y.to(out.dtype.element_ty), mask=j < V)


def delta_net(
    channels: Tensor,
    gate: Tensor,
    rates: Tensor,
    net: DeltaNet,
    inputs: Tensor,
    memory: Tensor,
    seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """`layers.delta_net.delta_net`: [T, H * V] of the gate's type. Waits for nothing and reads nothing back.

    Where T equals the number of sequences, each may own one row at most: such a step is decode alone, and two launches.
    Rows that no sequence owns (equal `query_starts`) are neither read nor written. Raises ValueError for shapes that do
    not fit.
    """
    _check(channels, gate, rates, net, inputs, memory)
    num_rows, num_sequences = len(channels), len(context_lens)
    check(len(query_starts) == num_sequences + 1, "query_starts must be [S + 1]", query_starts, context_lens)
    where = (seats, query_starts, context_lens)
    mixed = causal_conv(channels, inputs, net, *where)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    is_decode = num_rows == num_sequences
    early = is_decode and num_rows <= MOST_EARLY and starts_early(gate)
    heads, dims = (net.num_key_heads, net.num_value_heads), (net.key_dim, net.value_dim)
    padded = [power_of_two(dim, 16) for dim in dims]
    launch(
        _one_row, (num_sequences, heads[1]), mixed, gate, rates, net.speed, net.rate_bias, net.gains, net.eps,
        memory, *where, out, mixed.stride(0), gate.stride(0), rates.stride(0), out.stride(0), memory.stride(0), *heads,
        dims[0], padded[0], dims[1], padded[1], early,
        num_warps=8 if padded[0] * padded[1] > 8192 else 4, maxnreg=REGISTERS, early=early,
    )  # fmt: skip
    if not is_decode:
        by_chunks(mixed, gate, rates, net, memory, *where, out)
    return out


def _check(channels: Tensor, gate: Tensor, rates: Tensor, net: DeltaNet, inputs: Tensor, memory: Tensor) -> None:
    heads, values = net.num_value_heads, net.num_value_heads * net.value_dim
    num_channels = 2 * net.num_key_heads * net.key_dim + values
    check(channels.shape[1] == net.conv.shape[1] == num_channels, "channels must be those of all heads", channels)
    check(gate.shape[1] == values and rates.shape[1] == 2 * heads, "each value head has a gate and rates", gate, rates)
    check(all(x.stride(1) == 1 for x in (channels, gate, rates)), "rows must be dense", channels, gate, rates)
    shapes = ((len(net.conv) - 1, num_channels), (heads, net.key_dim, net.value_dim))
    check((inputs.shape[1:], memory.shape[1:]) == shapes, "states must be those of the heads", inputs, memory)
    check(inputs.dtype == memory.dtype == torch.float32, "states must be float32", inputs, memory)
    check(inputs[0].is_contiguous() and memory[0].is_contiguous(), "a seat's state must be dense", inputs, memory)
