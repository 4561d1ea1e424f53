"""Norms, rotary positions and cache writes against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dashinfer_vlm.kernels import cpu_ops

pytestmark = pytest.mark.usefixtures("level")

SIZES = [(1, 1536), (300, 1280), (3, 13), (2, 1), (0, 8)]


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.double()


def strided(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width + 3)[:, 1:-2] * 3 + 1


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm_is_the_formula(rows: int, width: int) -> None:
    x, weight = strided(rows, width), torch.randn(width)
    assert_close(cpu_ops.rms_norm(x, weight, 1e-6), rms(x.double(), weight))


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_layer_norm_is_the_formula(rows: int, width: int) -> None:
    x, weight, bias = strided(rows, width), torch.randn(width), torch.randn(width)
    want = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(cpu_ops.layer_norm(x, weight, bias, 1e-6).double(), want, rtol=1e-5, atol=1e-5)


def test_norms_add_what_rows_lack() -> None:
    x, weight, bias, shift = torch.randn(5, 20), torch.randn(20), torch.randn(20), torch.randn(20)
    torch.testing.assert_close(
        cpu_ops.rms_norm(x, weight, 1e-6, shift=shift), cpu_ops.rms_norm(x + shift, weight, 1e-6)
    )
    got = cpu_ops.layer_norm(x, weight, bias, 1e-6, shift=shift)
    torch.testing.assert_close(got, cpu_ops.layer_norm(x + shift, weight, bias, 1e-6))


def test_norms_may_work_in_place() -> None:
    x, weight, bias = torch.randn(5, 20), torch.randn(20), torch.randn(20)
    want = cpu_ops.layer_norm(x, weight, bias, 1e-5)
    assert cpu_ops.layer_norm(x, weight, bias, 1e-5, out=x) is x
    assert torch.equal(x, want)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.double().chunk(2, dim=-1)
    cosine, sine = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)


@pytest.mark.parametrize("dim", [128, 80, 20, 6])
def test_rope_rotates_channel_pairs_of_a_strided_view_in_place(dim: int) -> None:
    canvas = torch.randn(50, 5, dim)
    before, cos, sin = canvas.clone(), torch.randn(50, dim // 2), torch.randn(50, dim // 2)
    cpu_ops.rope(canvas[:, 1:4], cos, sin)
    assert_close(canvas[:, 1:4], rotated(before[:, 1:4], cos, sin))
    assert torch.equal(canvas[:, 0], before[:, 0])
    assert torch.equal(canvas[:, 4], before[:, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [128, 20])
def test_write_kv_fills_its_slots_and_no_other(dim: int, dtype: torch.dtype) -> None:
    k, v = torch.randn(50, 4, dim)[:, 1:3], torch.randn(50, 2, dim)
    k_cache = torch.full((10, 8, 2, dim), 3.0, dtype=dtype)
    v_cache, slots = k_cache.clone(), torch.randperm(80)[:50]
    cpu_ops.write_kv(k, v, k_cache, v_cache, slots)
    for values, cache in ((k, k_cache), (v, v_cache)):
        want = torch.full((80, 2, dim), 3.0, dtype=dtype)
        want[slots] = values.to(dtype)
        assert torch.equal(cache.flatten(0, 1), want)


def test_bfloat16_rounding_is_that_of_torch_for_ties_infinities_and_nan() -> None:
    bits = torch.arange(0, 1 << 16, dtype=torch.int32) << 16
    values = torch.cat([(bits + low).view(torch.float32) for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = values.reshape(-1, 1, 16)
    k_cache = torch.zeros(1, len(values), 1, 16, dtype=torch.bfloat16)
    v_cache = k_cache.clone()
    cpu_ops.write_kv(values, values, k_cache, v_cache, torch.arange(len(values)))
    want, got = values.bfloat16().flatten(), k_cache.flatten()
    assert torch.equal(got.isnan(), want.isnan())
    finite = ~want.isnan()
    assert torch.equal(got[finite].view(torch.int16), want[finite].view(torch.int16))


def test_rope_write_kv_is_rope_then_write_and_leaves_k_alone() -> None:
    q, k, v = torch.randn(30, 6, 32), torch.randn(30, 2, 32), torch.randn(30, 2, 32)
    cos, sin, slots = torch.randn(30, 16), torch.randn(30, 16), torch.randperm(40)[:30]
    fused, separate = torch.zeros(2, 5, 8, 2, 32).bfloat16(), torch.zeros(2, 5, 8, 2, 32).bfloat16()
    q_separate, k_separate, k_before = q.clone(), k.clone(), k.clone()
    cpu_ops.rope_write_kv(q, k, v, cos, sin, fused[0], fused[1], slots)
    cpu_ops.rope(q_separate, cos, sin)
    cpu_ops.rope(k_separate, cos, sin)
    cpu_ops.write_kv(k_separate, v, separate[0], separate[1], slots)
    assert torch.equal(q, q_separate)
    assert torch.equal(k, k_before)
    assert torch.equal(fused, separate)


def test_row_kernels_name_what_is_wrong() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    k, cache, slots = torch.randn(2, 1, 8), torch.zeros(3, 4, 1, 8).bfloat16(), torch.tensor([0, 11])
    table = torch.randn(2, 4)
    cases: list[tuple[str, Callable[[], object]]] = [
        (r"weight: expected shape \[8\]", lambda: cpu_ops.rms_norm(x, weight[:7], 1e-6)),
        ("bias: expected float32", lambda: cpu_ops.layer_norm(x, weight, weight.bfloat16(), 1e-6)),
        ("out must not share", lambda: cpu_ops.rms_norm(x[:3], weight, 1e-6, out=x[1:])),
        ("cos: expected shape", lambda: cpu_ops.rope(k, torch.randn(2, 8), torch.randn(2, 8))),
        ("even head_dim", lambda: cpu_ops.rope(torch.randn(2, 1, 7), table, table)),
        ("slots: 12 of token 1 is not one of 12", lambda: cpu_ops.write_kv(k, k, cache, cache.clone(), slots + 1)),
        ("slots: -1 of token 0", lambda: cpu_ops.write_kv(k, k, cache, cache.clone(), slots - 1)),
        ("slots: expected int64", lambda: cpu_ops.write_kv(k, k, cache, cache.clone(), slots.int())),
        ("v: expected shape", lambda: cpu_ops.write_kv(k, k[:1], cache, cache.clone(), slots)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
