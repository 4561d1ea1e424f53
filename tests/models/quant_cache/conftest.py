"""Packed weights to keep and find."""

from __future__ import annotations

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedWeight


@pytest.fixture
def weights() -> dict[str, PackedWeight]:
    if not cpu_ops.available():
        pytest.skip(f"no native kernels: {cpu_ops.why_unavailable()}")
    torch.manual_seed(0)
    return {
        "a": cpu_ops.pack_linear_int8(torch.randn(70, 300)),
        "b+c": cpu_ops.pack_linear_int8(torch.randn(40, 257), 128, gate_up=True),
        "d": cpu_ops.pack_linear_int4(torch.randn(33, 100), 32),
        "e": cpu_ops.pack_linear(torch.randn(16, 31).bfloat16()),
    }
