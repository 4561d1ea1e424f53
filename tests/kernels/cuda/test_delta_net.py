"""Gated delta nets against a token after the other, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda.delta_net import delta_net
from dashinfer_vlm.kernels.delta_net import DeltaNet
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error
from tests.layers.delta_net_cases import NUM_SEATS, STEPS, Conv, Rule, Where, step, with_owners

EPS = 1e-6


@dataclass(frozen=True)
class Layer:
    """What the kernels are given: channels, gates and rates are views of joined rows; states of nobody are NaN."""

    channels: Tensor
    gate: Tensor
    rates: Tensor
    net: DeltaNet
    inputs: Tensor
    memory: Tensor
    where: Where

    @classmethod
    def random(
        cls,
        where: Where,
        dtype: torch.dtype = torch.float32,
        *,
        heads: tuple[int, int] = (1, 2),
        dims: tuple[int, int] = (16, 24),
        taps: int = 4,
        speed: float = 0.1,
    ) -> Layer:
        (num_keys, num_values), (key_dim, value_dim) = heads, dims
        keys, values, num_rows = num_keys * key_dim, num_values * value_dim, int(where[1][-1])
        num_channels = 2 * keys + values
        joined = torch.randn(num_rows, num_channels + values + 2 * num_values).to(dtype)
        channels, gate, rates = joined.split_with_sizes([num_channels, values, 2 * num_values], dim=1)
        net = DeltaNet(
            num_key_heads=num_keys,
            key_dim=key_dim,
            conv=torch.randn(taps, num_channels),
            speed=-speed * (1 + torch.rand(num_values)),
            rate_bias=torch.randn(num_values),
            gains=torch.randn(value_dim).to(dtype),
            eps=EPS,
        )
        inputs = with_owners(torch.randn(NUM_SEATS, taps - 1, num_channels), where)
        memory = with_owners(torch.randn(NUM_SEATS, num_values, key_dim, value_dim), where)
        return cls(channels, gate, rates, net, inputs, memory, where)

    def run(self) -> Tensor:
        net = self.net
        moved = {name: getattr(net, name).to(DEVICE) for name in ("conv", "speed", "rate_bias", "gains")}
        states = [x.to(DEVICE) for x in (self.inputs, self.memory)]
        channels, gate, rates, *where = (x.to(DEVICE) for x in (self.channels, self.gate, self.rates, *self.where))
        got = delta_net(channels, gate, rates, replace(net, **moved), *states, *where)
        for mine, there in zip((self.inputs, self.memory), states, strict=True):
            mine.copy_(there)
        return got.cpu()

    def one_by_one(self) -> tuple[Tensor, Tensor, Tensor]:
        """In float64: the result, and both states afterwards."""
        net, num_rows = self.net, len(self.channels)
        keys = net.num_key_heads * net.key_dim
        mixed, inputs = Conv(self.channels.double(), self.inputs, net.conv, self.where).one_by_one()
        q, k, v = mixed.split_with_sizes([keys, keys, self.gate.shape[1]], dim=1)
        learnt, forgotten = self.rates.double().chunk(2, dim=1)
        decay = net.speed.double() * torch.nn.functional.softplus(forgotten + net.rate_bias.double())
        q, k = (x.view(num_rows, -1, net.key_dim) for x in (q, k))
        v = v.view(num_rows, -1, net.value_dim)
        read, memory = Rule(q, k, v, learnt.sigmoid(), decay, self.memory, self.where).one_by_one()
        read *= (read.square().mean(-1, keepdim=True) + EPS).rsqrt() * net.gains.double()
        gate = self.gate.double()
        return read.flatten(1) * gate * gate.sigmoid(), inputs, memory


def assert_right(layer: Layer, tolerance: float) -> None:
    want, inputs, memory = layer.one_by_one()
    assert error(layer.run(), want) < tolerance
    assert torch.equal(layer.inputs.nan_to_num(9e9), inputs.float().nan_to_num(9e9))
    assert torch.equal(layer.memory.isnan(), memory.isnan())
    assert error(layer.memory.nan_to_num(), memory.nan_to_num()) < tolerance


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", STEPS)
def test_a_layer_is_that_of_float64(name: str, dtype: torch.dtype) -> None:
    assert_right(Layer.random(STEPS[name], dtype), 2 * allowed(dtype))


@pytest.mark.parametrize("speed", [0.0, 3.0, 30.0])
def test_nothing_is_forgotten_and_everything(speed: float) -> None:
    """Logarithms of what is left add up to hundreds, of which small differences count."""
    assert_right(Layer.random(STEPS["prompts beside streams"], speed=speed), 1e-5)


def test_little_is_forgotten_behind_rows_that_forget_everything() -> None:
    """Sums of tens of thousands, in which differences of 1 count to the last digit."""
    layer = Layer.random(step([64], [0]), speed=1.0)
    layer.rates[:20, 2:] = 2000
    assert_right(layer, 1e-5)


@pytest.mark.parametrize(
    ("heads", "dims", "taps"),
    [((1, 2), (128, 128), 4), ((1, 3), (5, 40), 3), ((2, 2), (16, 1), 2), ((2, 4), (33, 9), 4)],
    ids=str,
)
def test_heads_of_any_size_and_number(heads: tuple[int, int], dims: tuple[int, int], taps: int) -> None:
    assert_right(Layer.random(step([1, 3, 34], [4, 0, 9]), heads=heads, dims=dims, taps=taps), 1e-5)
    assert_right(Layer.random(step([1, 1], [4, 0]), heads=heads, dims=dims, taps=taps), 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_keys_that_are_all_alike(dtype: torch.dtype) -> None:
    """Each change is taken back by the next one, where powers of the system would grow beyond all digits."""
    layer = Layer.random(step([130], [0]), dtype, speed=0.0)
    layer.channels[:, :32] = layer.channels[0, :32]
    layer.rates[:, :2] = 20
    assert_right(layer, 2 * allowed(dtype))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 0, 70], [9, 0, 1]], ids=str)
def test_rows_that_nobody_owns_are_neither_read_nor_written(lengths: list[int]) -> None:
    """Nor do sequences without rows lose their states."""
    layer = Layer.random(step(lengths, [5, 3, 0]))
    want, inputs, memory = layer.one_by_one()
    num_rows, more = len(layer.channels), 5
    seats, starts, contexts = layer.where
    padded = replace(
        layer,
        channels=_with_nan(layer.channels, more),
        gate=_with_nan(layer.gate, more),
        rates=_with_nan(layer.rates, more),
        where=(
            torch.cat((seats, seats.new_full((more,), 2))),  # nobody's, as often as it is needed
            torch.cat((starts, starts[-1:].expand(more))),
            torch.cat((contexts, contexts.new_zeros(more))),
        ),
    )
    got = padded.run()
    assert error(got[:num_rows], want) < 1e-5
    assert got[num_rows:].isnan().all()
    assert torch.equal(layer.inputs.nan_to_num(9e9), inputs.float().nan_to_num(9e9))
    assert torch.equal(layer.memory.isnan(), memory.isnan())
    assert error(layer.memory.nan_to_num(), memory.nan_to_num()) < 1e-5


def _with_nan(x: Tensor, count: int) -> Tensor:
    return torch.cat((x, x.new_full((count, x.shape[1]), torch.nan)))


def test_a_prompt_in_parts_is_the_whole_prompt() -> None:
    whole = Layer.random(step([100], [0]))
    parts = replace(whole, inputs=whole.inputs.clone(), memory=whole.memory.clone())
    want, got = whole.run(), []
    for start, stop in ((0, 40), (40, 41), (41, 46), (46, 100)):
        rows = {name: getattr(whole, name)[start:stop] for name in ("channels", "gate", "rates")}
        got.append(replace(parts, **rows, where=step([stop - start], [start])).run())
    assert error(torch.cat(got), want) < 1e-5
    assert torch.equal(parts.inputs.nan_to_num(9e9), whole.inputs.nan_to_num(9e9))
    assert error(parts.memory.nan_to_num(), whole.memory.nan_to_num()) < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    layer = Layer.random(step([2, 1], [0, 4]))
    wrong: dict[str, dict[str, Any]] = {
        "channels must be those of all heads": {"channels": layer.channels[:, :-1]},
        "each value head has a gate and rates": {"rates": layer.rates[:, :-1]},
        "rows must be dense": {"gate": layer.gate.t().contiguous().t()},
        "states must be those of the heads": {"memory": layer.memory[:, :, :-1]},
        "states must be float32": {"memory": layer.memory.double()},
        "a seat's state must be dense": {"inputs": layer.inputs.mT.contiguous().mT},
        "query_starts must be": {"where": (layer.where[0], layer.where[1][:-1], layer.where[2])},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(layer, **change).run()
