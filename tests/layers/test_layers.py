"""Norms, activations and rotations against their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dashinfer_vlm.layers.activation import gelu, gelu_tanh, quick_gelu, silu_mul
from dashinfer_vlm.layers.memory import huge_pages, huge_zeros, in_huge_pages
from dashinfer_vlm.layers.norm import layer_norm, rms_norm
from dashinfer_vlm.layers.rotary import axes_of_channels, inverse_frequencies, mrope_cos_sin, rope, vision_cos_sin


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    x, weight = torch.tensor([[3.0, -4.0]]), torch.tensor([2.0, 1.0])
    root = math.sqrt(12.5 + 0.5)
    torch.testing.assert_close(rms_norm(x, weight, 0.5), torch.tensor([[6 / root, -4 / root]]))


def test_rms_norm_of_bfloat16_takes_its_statistics_in_float32() -> None:
    x, weight = torch.randn(5, 4096).bfloat16(), torch.ones(4096).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.float(), weight.float(), 1e-6).bfloat16())


def test_layer_norm_centres_and_scales() -> None:
    x, weight, bias = torch.tensor([[1.0, 5.0]]), torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(layer_norm(x, weight, bias, 0.0), torch.tensor([[-1.0, 2.0]]))


def test_activations_follow_their_formulas() -> None:
    x = torch.linspace(-6, 6, 24, dtype=torch.float64).view(3, 8)
    torch.testing.assert_close(silu_mul(x), x[:, :4] / (1 + (-x[:, :4]).exp()) * x[:, 4:])
    torch.testing.assert_close(quick_gelu(x), x / (1 + (-1.702 * x).exp()))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(gelu_tanh(x), x * 0.5 * (1 + torch.tanh(inner)))
    torch.testing.assert_close(gelu(x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


def test_rope_turns_pairs_of_channels_and_leaves_other_heads_alone() -> None:
    heads = torch.randn(5, 4, 6)
    before = heads.clone()
    angles = torch.randn(5, 3)
    rope(heads[:, :3], angles.cos(), angles.sin())
    pairs = torch.complex(before[..., :3], before[..., 3:]) * torch.exp(1j * angles)[:, None]
    torch.testing.assert_close(heads[:, :3], torch.cat([pairs.real, pairs.imag], dim=-1)[:, :3])
    assert torch.equal(heads[:, 3], before[:, 3])


def test_mrope_channels_turn_with_the_axis_of_their_section() -> None:
    frequencies = inverse_frequencies(12, 100.0, torch.device("cpu"))
    torch.testing.assert_close(frequencies, torch.tensor([100.0 ** (-i / 6) for i in range(6)]))
    positions = torch.tensor([[3], [5], [7]])
    cos, sin = mrope_cos_sin(positions, frequencies, axes_of_channels((1, 2, 3), torch.device("cpu")))
    angles = torch.tensor([[3.0, 5, 5, 7, 7, 7]]) * frequencies
    torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()))


def test_vision_channels_turn_with_row_then_column() -> None:
    cos, sin = vision_cos_sin(torch.tensor([[2, 9]]), torch.tensor([1.0, 0.5]))
    angles = torch.tensor([[2.0, 1.0, 9.0, 4.5]])
    torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()))


@pytest.mark.parametrize("rows", [1, 1 << 12])
def test_memory_in_huge_pages_is_zero_writable_and_its_own(rows: int) -> None:
    zeros = huge_zeros((rows, 3, 171), torch.bfloat16)
    assert zeros.shape == (rows, 3, 171)
    assert not zeros.any()
    source = torch.randn(rows, 171)
    copy = in_huge_pages(source, torch.float32)
    assert torch.equal(copy, source)
    copy += 1
    assert not torch.equal(copy, source)
    assert F.relu(zeros + 1).all()


def test_the_state_of_huge_pages_is_said_in_one_clause(tmp_path: Path) -> None:
    assert huge_pages(tmp_path) == "transparent huge pages: the system has none"
    setting, usage = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", tmp_path / "proc/self/smaps_rollup"
    for file, text in (
        (setting, "always [madvise] never\n"),
        (usage, "Rss:     9 kB\nAnonymous:  3145728 kB\nAnonHugePages:   2621440 kB\n"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert huge_pages(tmp_path) == "transparent huge pages: madvise, 2.50 of 3.00 GiB are in them"
