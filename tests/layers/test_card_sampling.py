"""Sampling over all rows at once, which waits for nothing, beside the reference, which takes one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices
from dashinfer_vlm.layers import card_sampling, sampling
from tests.kernels.sampling_cases import choices, strided
from tests.searching import searched


def chosen(logits: torch.Tensor, given: Choices, seen: card_sampling.SeenCounts | None = None) -> list[int]:
    """As the sampler of a card does it."""
    is_shaped = seen is not None or any(sampling._is_shaped(given, row) for row in range(len(logits)))
    shaped = card_sampling.shape(logits, given, seen) if is_shaped else None
    if not given.temperature.any():
        return card_sampling.largest(logits, shaped).tolist()
    temperature, top_k, top_p = given.temperature.numpy(), given.top_k.numpy(), given.top_p.numpy()
    num_candidates = card_sampling.candidates(temperature, top_k, top_p, logits.shape[1])
    return card_sampling.choose(logits, given, shaped, num_candidates=num_candidates).tolist()


def assert_equal_but_for_rounding(logits: torch.Tensor, given: Choices) -> None:
    """The same tokens, or ones that another last digit of the random number would have given."""
    before = logits.clone()
    got = chosen(logits, given)
    assert torch.equal(logits, before)
    near = set()
    for step in (-1e-5, 0, 1e-5):
        moved = replace(given, uniform=(given.uniform + step).clamp(0, 1 - 2**-24))
        near |= set(enumerate(sampling.choose(logits, moved).tolist()))
    assert set(enumerate(got)) <= near


@searched(60)
@given(data=st.data(), width=st.sampled_from([1, 2, 33, 300]), seed=st.integers(0, 1000))
def test_tokens_are_those_of_the_reference(data: st.DataObject, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    num_rows = data.draw(st.integers(1, 4))

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(strategy, min_size=num_rows, max_size=num_rows))

    ids = st.integers(0, width - 1)
    given = choices(
        num_rows,
        temperature=each(st.sampled_from(data.draw(st.sampled_from([[0], [0, 0.7, 20], [1, 2]])))),
        top_k=each(st.sampled_from(data.draw(st.sampled_from([[0], [0, 3, 5000], [1, 20]])))),
        top_p=each(st.sampled_from([0, 0.3, 0.8, 1])),
        min_p=each(st.sampled_from([0, 0.02, 0.3, 1])),
        uniform=each(st.floats(0, 1 - 2**-24, width=32)),
        repetition_penalty=each(st.sampled_from([0.7, 1, 1.3])),
        presence_penalty=each(st.sampled_from([-1, 0, 1])),
        frequency_penalty=each(st.sampled_from([0, 0.25])),
        bias=each(st.lists(st.tuples(ids, st.integers(-9, 9)), max_size=4, unique_by=lambda pair: pair[0])),
        seen=each(st.lists(st.tuples(ids, st.integers(0, 3)), max_size=6, unique_by=lambda pair: pair[0])),
        forbidden=each(st.lists(ids, max_size=5)),
        mask=torch.randint(-(2**31), 2**31, (num_rows, -(-width // 32)), dtype=torch.int32)
        if data.draw(st.booleans())
        else None,
    )
    logits = strided(num_rows, width)
    if data.draw(st.booleans()):
        logits.round_()  # equal ones
    assert_equal_but_for_rounding(logits, given)


def test_seen_tokens_that_the_device_counts_are_penalised_as_listed_ones() -> None:
    torch.manual_seed(0)
    logits = strided(3, 40)
    penalties = {"repetition_penalty": [1.3, 1.0, 0.7], "presence_penalty": 0.5, "frequency_penalty": 0.25}
    seats, rows = torch.tensor([5, 1]), torch.tensor([0, 2])
    seen = card_sampling.SeenCounts(torch.zeros(6, 40, dtype=torch.int32), seats, rows)
    seen.table[5, 4] = seen.table[5, 7] = 1  # seen in the prompt
    for first, _, last in ([7, 0, 1], [7, 0, 39], [39, 0, 39], [39, 0, 39]):
        seen.add(torch.tensor([first, 0, last]))
    listed = choices(3, seen=[[(4, 0), (7, 2), (39, 2)], [], [(1, 1), (39, 3)]], **penalties)
    by_count = card_sampling.shape(logits, choices(3, **penalties), seen)
    assert torch.equal(by_count, card_sampling.shape(logits, listed, None))
    assert not torch.equal(by_count, logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_a_number_gives_none_and_harms_no_other(bad: float) -> None:
    logits = strided(3, 257)
    logits[1, 130] = bad
    for temperature in (0, 1):
        given = choices(3, temperature=temperature, forbidden=[[]] * 2 + [list(range(257))])
        token, none, nothing = chosen(logits, given)
        assert 0 <= token < 257
        assert (none, nothing) == (NOT_A_NUMBER, NOTHING_ALLOWED)


def test_the_last_token_is_drawn_by_the_largest_random_number_and_none_of_no_weight() -> None:
    logits = torch.full((2, 600), -1e9)
    logits[:, 7], logits[0, 599] = 0.0, 0.0
    for extra in ({}, {"top_p": 0.99}, {"top_k": 10}, {"min_p": 0.5}):
        assert chosen(logits, choices(2, temperature=1, uniform=1 - 2**-24, **extra)) == [599, 7]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [([0, 0], [5, 5], [0.5, 1], None), ([1, 1], [0, 0], [1, 1], 0), ([1, 0], [20, 0], [1, 1], 20),
     ([1, 1], [20, 7], [0.5, 1], 20), ([1, 1], [20, 0], [1, 1], 99), ([1, 1], [0, 0], [0.9, 1], 99),
     ([1, 1], [500, 3], [1, 1], 99)],
)  # fmt: skip
def test_no_more_logits_are_ordered_than_can_be_drawn(
    temperature: list[float], top_k: list[int], top_p: list[float], expected: int | None
) -> None:
    assert card_sampling.candidates(np.array(temperature), np.array(top_k), np.array(top_p), 99) == expected


@pytest.mark.parametrize("width", [1, 20, 1000])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_what_is_told_of_a_token_is_what_the_reference_tells(width: int, num_top: int) -> None:
    torch.manual_seed(0)
    logits = strided(4, width).round()
    logits[logits == 0] = -0.0
    rows, tokens = torch.tensor([3, 0]), torch.tensor([0, width - 1])
    told = card_sampling.tell(logits, rows, tokens, num_top)
    want = sampling.likeliest(logits, rows, tokens, num_top)
    base = (want.largest.double() + want.log_totals.double())[:, None]
    count = want.top_ids.shape[1]
    assert told.shape == (2, 2 + 2 * count)
    torch.testing.assert_close(told[:, :1], logits[rows, tokens].double()[:, None] - base)
    assert told[:, 1].tolist() == want.ranks.tolist()
    assert told[:, 2 : 2 + count].long().tolist() == want.top_ids.tolist()
    ids = want.top_ids.long()
    torch.testing.assert_close(told[:, 2 + count :], logits[rows].gather(1, ids).double() - base)
