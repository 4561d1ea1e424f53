from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    import quick_interpreter

    quick_interpreter.leave_out_what_is_in_vain()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy, which interprets, reports what a card computes silently


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(77)

    monkeypatch.setattr(torch, "empty", poisoned)
