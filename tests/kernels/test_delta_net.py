"""The delta rule and its convolution against a token after the other in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops
from tests.layers.delta_net_cases import STEPS, Conv, Rule, step

pytestmark = pytest.mark.usefixtures("level")


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("speed", [0.1, 30.0])
@pytest.mark.parametrize("name", STEPS)
def test_the_delta_rule_is_that_of_float64(name: str, speed: float) -> None:
    case = Rule.random(STEPS[name], speed=speed)
    expected, after = case.one_by_one()
    assert_close(cpu_ops.delta_rule(*case.args), expected)
    assert_close(case.memory, after)


@pytest.mark.parametrize(
    ("heads", "dims"), [((1, 2), (128, 128)), ((1, 3), (5, 40)), ((2, 2), (16, 1)), ((2, 6), (9, 33))], ids=str
)
def test_heads_of_any_size_and_number(heads: tuple[int, int], dims: tuple[int, int], num_threads: int) -> None:
    case = Rule.random(step([3, 1], [0, 4]), heads=heads, dims=dims)
    expected, after = case.one_by_one()
    assert_close(cpu_ops.delta_rule(*case.args), expected)
    assert_close(case.memory, after)


@pytest.mark.parametrize(("size", "num_channels"), [(4, 700), (3, 256), (2, 50)])
@pytest.mark.parametrize("name", STEPS)
def test_the_convolution_is_that_of_float64(name: str, size: int, num_channels: int) -> None:
    case = Conv.random(STEPS[name], size=size, num_channels=num_channels)
    expected, after = case.one_by_one()
    torch.testing.assert_close(cpu_ops.causal_conv(*case.args).double(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(case.inputs.nan_to_num(9e9), after.nan_to_num(9e9))


def test_a_sequence_without_rows_keeps_its_state() -> None:
    where = step([0, 3], [4, 0])
    rule, conv = Rule.random(where), Conv.random(where)
    memory, inputs = rule.memory[where[0][0]].clone(), conv.inputs[where[0][0]].clone()
    cpu_ops.delta_rule(*rule.args)
    cpu_ops.causal_conv(*conv.args)
    assert torch.equal(rule.memory[where[0][0]], memory)
    assert torch.equal(conv.inputs[where[0][0]], inputs)


def test_what_is_wrong_is_named() -> None:
    where = step([2, 1], [0, 4])
    rule, conv = Rule.random(where), Conv.random(where)
    seats, starts, contexts = where

    def at(*elsewhere: torch.Tensor) -> torch.Tensor:
        return cpu_ops.causal_conv(conv.x, conv.inputs, conv.weight, *elsewhere)

    cases: list[tuple[str, Callable[[], object]]] = [
        ("k: expected shape", lambda: cpu_ops.delta_rule(*replace(rule, k=rule.k[:, :1]).args)),
        ("v: expected a multiple of 2 heads", lambda: cpu_ops.delta_rule(*replace(rule, v=rule.v[:, :5]).args)),
        ("beta: expected shape", lambda: cpu_ops.delta_rule(*replace(rule, beta=rule.beta[:, :2]).args)),
        ("memory: expected shape", lambda: cpu_ops.delta_rule(*replace(rule, memory=rule.memory[..., :3]).args)),
        ("memory: expected float32", lambda: cpu_ops.delta_rule(*replace(rule, memory=rule.memory.bfloat16()).args)),
        ("seats: 9 of sequence 0 is not one of 6", lambda: at(seats + 5, starts, contexts)),
        ("seats: -1 of sequence 0", lambda: at(seats - 5, starts, contexts)),
        ("query_starts: must go from 0", lambda: at(seats, starts + 1, contexts)),
        ("context_lens: expected shape", lambda: at(seats, starts, contexts[:1])),
        ("inputs: expected shape", lambda: cpu_ops.causal_conv(*replace(conv, inputs=conv.inputs[:, :2]).args)),
        ("weight: expected at least two", lambda: cpu_ops.causal_conv(*replace(conv, weight=conv.weight[:1]).args)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
