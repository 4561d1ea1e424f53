"""Native sampling against the reference: rows of every width, strided, with every combination of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices
from dashinfer_vlm.layers import sampling
from tests.kernels.sampling_cases import assert_equal_but_for_rounding, choices, rows_and_choices, strided
from tests.searching import searched

pytestmark = pytest.mark.usefixtures("level")

WIDTHS = [1, 2, 31, 32, 33, 127, 128, 129, 256, 1000, 4099]


@searched(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_and_choices(WIDTHS))
def test_tokens_are_those_of_the_reference(case: tuple[Tensor, Choices]) -> None:
    assert_equal_but_for_rounding(cpu_ops.choose, *case)


@pytest.mark.parametrize("width", [151_936, 151_643])
def test_a_whole_vocabulary_is_cut_as_the_reference_cuts_it(width: int, num_threads: int) -> None:
    kinds: list[dict[str, float]] = [
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 1, "top_p": 0.95},
        {"temperature": 3, "top_p": 0.5},
        {"temperature": 1},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 2, "top_k": 5000},
    ]
    columns = {name: [kind.get(name, default) for kind in kinds] for name, default in
               (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0.0), ("min_p", 0.0))}  # fmt: skip
    uniform = torch.rand(len(kinds), generator=torch.Generator().manual_seed(num_threads))
    assert_equal_but_for_rounding(
        cpu_ops.choose, strided(len(kinds), width), choices(len(kinds), uniform=uniform, **columns)
    )


def test_the_largest_is_the_first_of_equal_ones() -> None:
    logits = torch.zeros(3, 300)
    logits[1, 200:] = 1
    logits[2, 299] = 1
    assert cpu_ops.choose(logits, choices(3)).tolist() == [0, 200, 299]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 130, 256])
def test_a_row_that_is_not_a_number_gives_none_and_harms_no_other(bad: float, place: int) -> None:
    logits = strided(3, 257)
    logits[1, place] = bad
    for temperature in (0, 1):
        given = choices(3, temperature=temperature, forbidden=[[]] * 2 + [list(range(257))])
        token, none, nothing = cpu_ops.choose(logits, given).tolist()
        assert 0 <= token < 257
        assert (none, nothing) == (NOT_A_NUMBER, NOTHING_ALLOWED)


@pytest.mark.parametrize("choose", [cpu_ops.choose, sampling.choose])
@pytest.mark.parametrize("width", [20, 3000])
def test_a_logit_that_a_penalty_makes_infinite_gives_none(choose: Callable[..., Tensor], width: int) -> None:
    logits = torch.zeros(1, width)
    logits[0, 7] = 3e38
    for how in (
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 1, "top_p": 0.9},
        {"temperature": 1, "top_k": 5},
    ):
        given = choices(1, repetition_penalty=1e-3, seen=[[(7, 0)]], **how)
        assert choose(logits, given).tolist() == [NOT_A_NUMBER]


def test_the_last_token_is_drawn_by_the_largest_random_number_and_none_of_no_weight() -> None:
    logits = torch.full((2, 600), -1e9)
    logits[:, 7], logits[0, 599] = 0.0, 0.0
    for extra in ({}, {"top_p": 0.99}, {"top_k": 10}, {"min_p": 0.5}):
        given = choices(2, temperature=1, uniform=1 - 2**-24, **extra)
        assert cpu_ops.choose(logits, given).tolist() == [599, 7]


@pytest.mark.parametrize("width", [1, 20, 128, 1000])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_what_is_told_of_a_token_is_what_the_reference_tells(width: int, num_top: int) -> None:
    logits = strided(4, width).round()
    rows, tokens = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([0, width - 1], dtype=torch.int32)
    got, want = cpu_ops.likeliest(logits, rows, tokens, num_top), sampling.likeliest(logits, rows, tokens, num_top)
    torch.testing.assert_close(got.log_totals, want.log_totals)
    for name in ("largest", "ranks", "top_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"forbidden": [[300], []]}, "forbidden_ids"),
        ({"bias": [[(-1, 2.0)], []]}, "bias_ids"),
        ({"mask": torch.zeros(2, 9, dtype=torch.int32)}, "mask"),
        ({"seen": [[(1, 0)]]}, "seen_starts"),
    ],
)
def test_ids_and_shapes_that_do_not_fit_are_refused(columns: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cpu_ops.choose(torch.zeros(2, 300), choices(2, **columns))
