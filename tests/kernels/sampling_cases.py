"""Rows and parameters of sampling, for every implementation that is held against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dashinfer_vlm.kernels.choices import Choices
from dashinfer_vlm.layers import sampling


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


def assert_equal_but_for_rounding(choose: Callable[[Tensor, Choices], Tensor], logits: Tensor, given: Choices) -> None:
    """The same tokens, or ones that another last digit of the random number would have given."""
    before = logits.clone()
    got = choose(logits, given)
    assert torch.equal(logits, before)
    near = set()
    for step in (-1e-5, 0, 1e-5):
        uniform = (given.uniform + step).clamp(0, 1 - 2**-24)
        moved = Choices(**{n: getattr(given, n) for n in Choices.__slots__} | {"uniform": uniform})
        near |= set(enumerate(sampling.choose(logits, moved).tolist()))
    assert set(enumerate(got.tolist())) <= near


@st.composite
def rows_and_choices(draw: st.DrawFn, widths: list[int]) -> tuple[Tensor, Choices]:
    """Rows of one of these widths, strided, with every combination of parameters."""
    width = draw(st.sampled_from(widths))
    torch.manual_seed(draw(st.integers(0, 1000)))
    num_rows = draw(st.integers(1, 5))

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=num_rows, max_size=num_rows))

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
        if draw(st.booleans())
        else None,
    )
    logits = strided(num_rows, width)
    if draw(st.booleans()):
        logits.round_()  # equal ones
    return logits, given
