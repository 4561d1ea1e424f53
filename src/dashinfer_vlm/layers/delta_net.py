"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024) and the causal convolution in front of it, in plain torch.

Both go on from the states of the step's sequences: sequence s owns rows `query_starts[s] .. query_starts[s + 1]` (int32
[S + 1]), the last tokens of its `context_lens[s]` (int32 [S]), and its state lies in seat `seats[s]` (int64 [S], no two
alike), where it is brought up to date. Who has no tokens in front of these rows begins with zeros, whatever lies there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import silu

__all__ = ["causal_conv", "delta_rule"]

CHUNK = 64
"""Tokens that are computed together: products of matrices in place of a step per token."""


def causal_conv(
    x: Tensor, inputs: Tensor, weight: Tensor, seats: Tensor, query_starts: Tensor, context_lens: Tensor
) -> Tensor:
    """SiLU of each channel's weighted sum over its K newest inputs; float32 [T, C], as x is.

    `inputs` [seats, K - 1, C] are the last ones of each sequence. `weight` is [K, C], that of the newest input last.
    """
    out = torch.empty_like(x)
    for rows, seated, is_new in _alike(seats, query_starts, context_lens):
        before, num_tokens = inputs[seated], rows.shape[1]
        before[is_new] = 0
        padded = torch.cat((before, x[rows]), dim=1)
        inputs[seated] = padded[:, num_tokens:]
        y = padded[:, -num_tokens:] * weight[-1]
        for k in range(len(weight) - 1):
            y.addcmul_(padded[:, k : k + num_tokens], weight[k])
        out[rows] = silu(y, inplace=True)
    return out


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    memory: Tensor,
    seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """What each head's query reads of its memory; [T, H, V].

    All are float32: q and k [T, Hk, K], which are brought to length 1, v [T, H, V], beta and decay [T, H], memory
    [seats, H, K, V]. Head h has q and k of head `h // (H / Hk)`. A token multiplies the memory by exp(decay), at most
    1, then moves what its k finds there towards its v, by the share beta; then its q, over the root of K, reads.
    """
    group = v.shape[1] // k.shape[1]
    q, k = (_of_length_1(x).repeat_interleave(group, dim=1) for x in (q, k))
    parts = (q * q.shape[-1] ** -0.5, k, v, beta, decay)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for rows, seated, is_new in _alike(seats, query_starts, context_lens):
        kept = memory[seated]
        kept[is_new] = 0
        for start in range(0, rows.shape[1], CHUNK):
            piece = rows[:, start : start + CHUNK]
            heads = [x[piece].transpose(1, 2) for x in parts]
            out[piece] = _chunk(*heads, memory=kept).transpose(1, 2)
        memory[seated] = kept
    return out


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, *, memory: Tensor) -> Tensor:
    """[n, H, T, V], all of [n, H, T, ...]. What the tokens change in the memory is found at once: each change depends
    on those before it, so that they solve a triangular system (Yang et al. 2024)."""
    total = decay.double().cumsum(-1)[..., None]  # of hundreds, small differences are wanted
    since = (total - total.mT).to(q.dtype).tril().exp().tril()  # from a column's token to a row's; 0 if that is earlier
    left, until_end, beta = total.exp().to(q.dtype), (total[..., -1:, :] - total).exp().to(q.dtype), beta[..., None]
    system = beta * (k @ k.mT) * since  # with a diagonal of 1, whatever stands there
    changes: Tensor = solve_triangular(system, beta * (v - left * (k @ memory)), upper=False, unitriangular=True)
    read = left * (q @ memory) + (q @ k.mT * since) @ changes
    memory.mul_(left[..., -1:, :]).add_((k * until_end).mT @ changes)
    return read


def _of_length_1(x: Tensor) -> Tensor:
    """[..., D], but for what is near to 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _alike(seats: Tensor, query_starts: Tensor, context_lens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows [n, T], seats [n], and which are new [n], of the n sequences of each number of rows T but 0."""
    lengths = query_starts.diff()
    for length in sorted({*lengths.tolist()} - {0}):
        which = (lengths == length).nonzero().flatten()
        rows = query_starts[which].long()[:, None] + torch.arange(length, device=seats.device)
        yield rows, seats[which], context_lens[which] == length
