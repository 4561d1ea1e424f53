"""Keys and values in 8 bits: the logits stay near those of float32, however the prompt is computed."""

from __future__ import annotations

import pytest
import torch

from dashinfer_vlm.models.base import Model
from tests.models.driving import Driver, image, prompt

CASE = prompt(9, image(112, 84, 1), 30, seed=3)


def logits(model: Model, kv_dtype: torch.dtype | None, chunk: int = 1000) -> torch.Tensor:
    driver = Driver(model, kv_dtype=kv_dtype)
    return driver.run(driver.start(CASE), chunk)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def test_the_logits_stay_near_those_of_float32(model: Model) -> None:
    exact = logits(model, None)
    error = relative_error(logits(model, torch.int8), exact)
    assert 0 < error < 0.02
    assert error < 4 * relative_error(logits(model, torch.bfloat16), exact)


@pytest.mark.parametrize("chunk", [1, 7])
def test_prefill_in_chunks_reads_the_same_rows_as_prefill_at_once(model: Model, chunk: int) -> None:
    assert relative_error(logits(model, torch.int8, chunk), logits(model, torch.int8)) < 1e-3


def test_memory_is_little_more_than_half_of_bfloat16(model: Model) -> None:
    eight_bit, sixteen_bit = (
        sum(cache.nbytes for cache in (*kv.keys, *kv.values))
        for kv in (Driver(model, kv_dtype=dtype).kv for dtype in (torch.int8, torch.bfloat16))
    )
    assert eight_bit / sixteen_bit == (model.text.head_dim + 4) / (2 * model.text.head_dim)
