"""The gated delta rule and its convolution in plain torch against a token after the other, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dashinfer_vlm.layers.delta_net import CHUNK, causal_conv, delta_rule
from tests.layers.delta_net_cases import STEPS, Conv, Rule, step


@pytest.mark.parametrize("speed", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("name", STEPS)
def test_what_is_read_and_kept_is_that_of_one_token_after_the_other(name: str, speed: float) -> None:
    case = Rule.random(STEPS[name], speed=speed)
    expected, after = case.one_by_one()
    torch.testing.assert_close(delta_rule(*case.args).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.memory.double(), after, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("length", [1, 7, CHUNK + 1])
def test_it_goes_on_where_it_was(length: int) -> None:
    whole = Rule.random(step([2 * CHUNK], [0]))
    parts = whole.copy()
    expected = delta_rule(*whole.args)
    read = []
    for start, stop in pairwise([*range(0, 2 * CHUNK, length), 2 * CHUNK]):
        read.append(delta_rule(*parts.rows(start, stop).args))
    torch.testing.assert_close(torch.cat(read), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.memory, whole.memory, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_key_of_zeros_changes_nothing() -> None:
    case = Rule.random(step([1], [3]), speed=0.0)
    before = case.memory.clone()
    delta_rule(case.q, torch.zeros_like(case.k), *case.args[2:])
    torch.testing.assert_close(case.memory, before, equal_nan=True)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", STEPS)
def test_the_convolution_sees_what_came_before(name: str, size: int) -> None:
    case = Conv.random(STEPS[name], size=size)
    expected, after = case.one_by_one()
    torch.testing.assert_close(causal_conv(*case.args).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(case.inputs.nan_to_num(9e9), after.nan_to_num(9e9))
