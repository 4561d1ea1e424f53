"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024) and the causal convolution in front of it, in plain torch.

Both go on from what they kept of a sequence: in chunks of any length they give what they give at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import silu

__all__ = ["causal_conv", "gated_delta_rule", "l2_norm"]

CHUNK = 64
"""Tokens that are computed together: products of matrices in place of a step per token."""


def causal_conv(x: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """SiLU of each channel's weighted sum over its K newest inputs; [n, T, C] from [n, T, C] of n sequences.

    `inputs` [n, K - 1, C] are those in front of x, and become the last ones of x. `weight` is [K, C], that of the
    newest input last.
    """
    num_tokens, padded = x.shape[1], torch.cat((inputs, x), dim=1)
    inputs.copy_(padded[:, num_tokens:])
    y = x * weight[-1]
    for k in range(len(weight) - 1):
        y.addcmul_(padded[:, k : k + num_tokens], weight[k])
    return silu(y, inplace=True)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor) -> Tensor:
    """What each head's q reads of its memory; float32 [n, T, H, V] of n sequences.

    q and k are float32 [n, T, H, K], v is [n, T, H, V], beta and decay are [n, T, H]. A token multiplies the memory
    [n, H, K, V] by exp(decay), at most 1, then moves what its k finds there towards its v, by the share beta; then its
    q reads. The memory becomes that after the last token.
    """
    out = torch.empty_like(v)
    for start in range(0, v.shape[1], CHUNK):
        piece = slice(start, start + CHUNK)
        heads = [x[:, piece].transpose(1, 2) for x in (q, k, v, beta, decay)]
        out[:, piece] = _chunk(*heads, memory=memory).transpose(1, 2)
    return out


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, *, memory: Tensor) -> Tensor:
    """[n, H, T, V], all of [n, H, T, ...]. What the tokens change in the memory is found at once: each change depends
    on those before it, so that they solve a triangular system (Yang et al. 2024)."""
    total = decay.double().cumsum(-1)[..., None]  # of hundreds, small differences are wanted
    since = (total - total.mT).float().tril().exp().tril()  # from a column's token to a row's; 0 if that is earlier
    left, until_end, beta = total.float().exp(), (total[..., -1:, :] - total).float().exp(), beta[..., None]
    system = beta * (k @ k.mT) * since  # with a diagonal of 1, whatever stands there
    changes: Tensor = solve_triangular(system, beta * (v - left * (k @ memory)), upper=False, unitriangular=True)
    read = left * (q @ memory) + (q @ k.mT * since) @ changes
    memory.mul_(left[..., -1:, :]).add_((k * until_end).mT @ changes)
    return read


def l2_norm(x: Tensor) -> Tensor:
    """[..., D] of length 1, but for what is near to 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
