"""What the tests of the card's kernels share: where they run, and how far two results may be apart."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""A card where there is one; else the kernels are interpreted (`tests/conftest.py`)."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of `want`; NaN where either holds one."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def allowed(dtype: torch.dtype) -> float:
    """`error` of a kernel against the reference in float64."""
    return 1e-5 if dtype == torch.float32 else 1e-2
