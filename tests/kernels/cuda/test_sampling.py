"""Tokens chosen by the card's kernel: the reference's, for the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from torch import Tensor

pytest.importorskip("triton")

from dashinfer_vlm.kernels import cuda
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices, moved
from dashinfer_vlm.kernels.cuda import sampling
from dashinfer_vlm.layers import card_sampling
from dashinfer_vlm.layers import sampling as reference
from tests.kernels.cuda.numbers import DEVICE
from tests.kernels.sampling_cases import assert_equal_but_for_rounding, choices, rows_and_choices, strided
from tests.searching import searched


def chosen(logits: Tensor, given: Choices) -> Tensor:
    return sampling.choose(logits.to(DEVICE) if DEVICE.type == "cuda" else logits, given)


@searched(10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_and_choices([1, 33, 256, 4099]))
def test_tokens_are_those_of_the_reference(case: tuple[Tensor, Choices]) -> None:
    assert_equal_but_for_rounding(chosen, *case)


@pytest.mark.parametrize(
    "columns",
    [
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 3, "top_p": 0.5},
        {"temperature": 1},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 2, "top_k": 5000},
    ],
)
def test_wide_rows_are_cut_as_the_reference_cuts_them(columns: dict[str, float]) -> None:
    assert_equal_but_for_rounding(chosen, strided(1, 9001), choices(1, uniform=torch.rand(1), **columns))


def test_equal_ones_are_kept_from_the_first_on() -> None:
    logits = torch.zeros(4, 5000)
    logits[1, 4500:] = 1
    logits[2, ::2] = -0.0  # equal, whatever its sign
    logits[3, 4200] = 3
    last = 1 - 2**-24
    assert chosen(logits, choices(4)).tolist() == [0, 4500, 0, 4200]
    assert chosen(logits, choices(4, temperature=1, top_k=3, uniform=last)).tolist()[:3] == [2, 4502, 2]
    given = choices(4, temperature=1, top_p=[3.5 / 5000, 0, 3.5 / 5000, 0], uniform=last)
    assert chosen(logits, given).tolist() == [3, 4500, 3, 4200]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 4096])
def test_a_row_that_is_not_a_number_gives_none_and_harms_no_other(bad: float, place: int) -> None:
    logits = strided(3, 4097)
    logits[1, place] = bad
    for temperature in (0, 1):
        given = choices(3, temperature=temperature, forbidden=[[]] * 2 + [list(range(4097))])
        token, none, nothing = chosen(logits, given).tolist()
        assert 0 <= token < 4097
        assert (none, nothing) == (NOT_A_NUMBER, NOTHING_ALLOWED)


def test_a_row_that_is_no_distribution_gives_none_without_any_penalty() -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[1, 3] = 0
    assert chosen(logits, choices(2, temperature=[1, 1])).tolist() == [NOT_A_NUMBER, 3]


def test_a_mask_that_allows_nothing_is_told() -> None:
    mask = torch.tensor([[0, 0], [1 << 5, 0], [0, 1 << 1]], dtype=torch.int32)
    assert chosen(strided(3, 34), choices(3, mask=mask)).tolist() == [NOTHING_ALLOWED, 5, 33]


def test_the_last_token_is_drawn_by_the_largest_random_number_and_none_of_no_weight() -> None:
    logits = torch.full((2, 600), -1e9)
    logits[:, 7], logits[0, 599] = 0.0, 0.0
    for extra in ({}, {"top_p": 0.99}, {"top_k": 10}, {"min_p": 0.5}):
        given = choices(2, temperature=1, uniform=1 - 2**-24, **extra)
        assert chosen(logits, given).tolist() == [599, 7]


def test_arrays_that_are_moved_together_keep_their_numbers_and_begin_at_16_bytes() -> None:
    given = choices(
        3, top_k=[1, 2, 3], bias=[[(1, 2.5)], [], [(0, -1.0)]], seen=[[(4, 2)], [], []], forbidden=[[7]] * 3
    )
    there = moved(given, DEVICE)
    for name in Choices.__slots__:
        before, after = getattr(given, name), getattr(there, name)
        assert (before is after) if before is None else torch.equal(before, after.cpu())
        assert after is None or after.data_ptr() % 16 == 0


@pytest.mark.parametrize("width", [1, 20, 1000])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_what_is_told_of_a_token_is_what_the_reference_tells(width: int, num_top: int) -> None:
    logits = strided(4, width).round().to(DEVICE)  # equal ones, and zeros of both signs
    rows, tokens = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([0, width - 1], dtype=torch.int32)
    got, want = sampling.likeliest(logits, rows, tokens, num_top), reference.likeliest(logits, rows, tokens, num_top)
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
        sampling.choose(torch.zeros(2, 300), choices(2, **columns))


def test_a_step_on_a_card_draws_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernel = card_sampling.chooser(torch.device("cuda"))
    logits = strided(3, 70).to(DEVICE)
    given = moved(choices(3, temperature=[0, 1, 1], top_k=[0, 5, 0], top_p=[1, 1, 0.5], forbidden=[[2]] * 3), DEVICE)
    shaped = card_sampling.shape(logits, given, None)
    tokens = by_kernel(logits, given, shaped, num_candidates=70)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, card_sampling.choose(logits, given, shaped, num_candidates=70))
    assert by_kernel is not card_sampling.choose
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no")
    assert card_sampling.chooser(torch.device("cuda")) is card_sampling.choose


def test_a_card_chooses_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference.sampling_ops(torch.device("cuda")).choose is sampling.choose
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "no")
    assert reference.sampling_ops(torch.device("cuda")) is reference.REFERENCE
