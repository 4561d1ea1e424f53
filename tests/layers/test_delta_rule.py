"""The gated delta rule and its convolution against a loop over tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dashinfer_vlm.layers.delta_rule import CHUNK, causal_conv, gated_delta_rule, l2_norm

SEQUENCES, HEADS, KEY, VALUE = 2, 3, 8, 12
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(num_tokens: int, speed: float) -> Inputs:
    """q, k, v, beta and decay; the larger `speed`, the sooner all is forgotten."""
    torch.manual_seed(num_tokens)
    q, k = (l2_norm(torch.randn(SEQUENCES, num_tokens, HEADS, KEY)) for _ in range(2))
    rates = torch.rand(2, SEQUENCES, num_tokens, HEADS)
    return q, k, torch.randn(SEQUENCES, num_tokens, HEADS, VALUE), rates[0], -speed * rates[1]


def one_by_one(parts: Inputs, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition: what is read, and the memory afterwards."""
    q, k, v, beta, decay = (x.double() for x in parts)
    memory, read = memory.double(), []
    for t in range(q.shape[1]):
        memory = memory * decay[:, t, :, None, None].exp()
        found = torch.einsum("nhkv,nhk->nhv", memory, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - found)
        memory = memory + torch.einsum("nhk,nhv->nhkv", k[:, t], change)
        read.append(torch.einsum("nhkv,nhk->nhv", memory, q[:, t]))
    return torch.stack(read, dim=1), memory


@pytest.mark.parametrize("speed", [0.0, 0.05, 30.0])
@pytest.mark.parametrize("num_tokens", [1, 2, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_chunks_are_what_one_token_after_the_other_gives(num_tokens: int, speed: float) -> None:
    parts, memory = inputs(num_tokens, speed), torch.randn(SEQUENCES, HEADS, KEY, VALUE)
    expected, after = one_by_one(parts, memory)
    torch.testing.assert_close(gated_delta_rule(*parts, memory).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(memory.double(), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [1, 7, CHUNK + 1])
def test_it_goes_on_where_it_was(step: int) -> None:
    parts = inputs(2 * CHUNK, 0.05)
    at_once, in_steps = torch.zeros(2, SEQUENCES, HEADS, KEY, VALUE)
    expected = gated_delta_rule(*parts, at_once)
    steps = [slice(start, start + step) for start in range(0, 2 * CHUNK, step)]
    q, k, v, beta, decay = parts
    read = [gated_delta_rule(q[:, s], k[:, s], v[:, s], beta[:, s], decay[:, s], in_steps) for s in steps]
    torch.testing.assert_close(torch.cat(read, dim=1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(in_steps, at_once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_the_convolution_sees_what_came_before(step: int) -> None:
    x, weight = torch.randn(2, 20, 5), torch.randn(4, 5)
    kept = torch.randn(2, 3, 5)
    padded = torch.cat((kept, x), dim=1)
    expected = F.silu(F.conv1d(padded.mT, weight.t()[:, None], groups=5)).mT
    y = [causal_conv(x[:, start : start + step], kept, weight) for start in range(0, 20, step)]
    torch.testing.assert_close(torch.cat(y, dim=1), expected)
    assert torch.equal(kept, padded[:, -3:])


def test_nothing_becomes_no_number() -> None:
    assert torch.equal(l2_norm(torch.zeros(2, 3)), torch.zeros(2, 3))
