"""Native sampling against the reference: rows of every width, strided, with every combination of parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices
from dashinfer_vlm.layers import sampling

pytestmark = pytest.mark.usefixtures("level")

WIDTHS = st.sampled_from([1, 2, 31, 32, 33, 127, 128, 129, 256, 1000, 4099])


def choices(num_rows: int, **columns: Any) -> Choices:
    """Greedy and without penalties but for `columns`: a number for all rows, or one for each."""

    def column(name: str, default: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(columns.get(name, default), dtype=dtype).expand(num_rows).clone()

    lists: dict[str, Tensor] = {}
    for name, column_name in (("bias", "biases"), ("seen", "seen_counts"), ("forbidden", None)):
        rows = columns.get(name, [[]] * num_rows)  # of pairs, or of ids alone
        lists[f"{name}_starts"] = torch.tensor(np.cumsum([0, *map(len, rows)]), dtype=torch.int32)
        flat = [entry for row in rows for entry in row]
        ids = [entry[0] if column_name else entry for entry in flat]
        lists[f"{name}_ids"] = torch.tensor(ids, dtype=torch.int32)
        if column_name:
            dtype = torch.float32 if name == "bias" else torch.int32
            lists[column_name] = torch.tensor([entry[1] for entry in flat], dtype=dtype)
    return Choices(
        temperature=column("temperature", 0),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1),
        min_p=column("min_p", 0),
        uniform=column("uniform", 0.5),
        repetition_penalty=column("repetition_penalty", 1),
        presence_penalty=column("presence_penalty", 0),
        frequency_penalty=column("frequency_penalty", 0),
        mask=columns.get("mask"),
        **lists,
    )


def strided(num_rows: int, width: int, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, width + 5)[:, 2:-3] * scale


def assert_equal_but_for_rounding(logits: Tensor, given: Choices) -> None:
    """The same tokens, or ones that another last digit of the random number would have given."""
    before = logits.clone()
    got = cpu_ops.choose(logits, given)
    assert torch.equal(logits, before)
    near = set()
    for step in (-1e-5, 0, 1e-5):
        uniform = (given.uniform + step).clamp(0, 1 - 2**-24)
        moved = Choices(**{n: getattr(given, n) for n in Choices.__slots__} | {"uniform": uniform})
        near |= set(enumerate(sampling.choose(logits, moved).tolist()))
    assert set(enumerate(got.tolist())) <= near


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), width=WIDTHS, seed=st.integers(0, 1000))
def test_tokens_are_those_of_the_reference(data: st.DataObject, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    num_rows = data.draw(st.integers(1, 5))

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(strategy, min_size=num_rows, max_size=num_rows))

    ids = st.integers(0, width - 1)
    given = choices(
        num_rows,
        temperature=each(st.sampled_from([0, 0.7, 1, 2, 20])),
        top_k=each(st.sampled_from([0, 1, 3, 20, 200, 5000])),
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
    assert_equal_but_for_rounding(strided(len(kinds), width), choices(len(kinds), uniform=uniform, **columns))


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
