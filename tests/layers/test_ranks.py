"""Which part of a model each rank holds, for sizes that are published."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.layers.ranks import ALONE, WHOLE, Cut, Ranks

HEADS, KV_HEADS, HEAD_DIM, INNER, HIDDEN, VOCAB = 64, 8, 128, 29568, 8192, 152064
"""Of Qwen2-VL-72B and Qwen2.5-VL-72B."""


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_model_of_72_billion_is_divided(count: int) -> None:
    for what in (HEADS, KV_HEADS, INNER, VOCAB):
        parts = [Ranks(index, count).share(what, "things") for index in range(count)]
        assert [i for part in parts for i in range(what)[part]] == list(range(what))
        assert len({part.stop - part.start for part in parts}) == 1
    assert INNER // count % 16 == 0  # so that rows begin at multiples of 16 numbers


@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(12, 2, 4), (28, 4, 2), (32, 8, 8), (16, 2, 8)])
def test_keys_are_held_by_the_ranks_of_their_queries(heads: int, kv_heads: int, count: int) -> None:
    """Where there are fewer of them than ranks, too."""
    group = heads // kv_heads
    for index in range(count):
        ranks = Ranks(index, count)
        queries = ranks.share(heads, "attention heads")
        keys = ranks.share(kv_heads, "heads of keys", may_repeat=True)
        own = queries.stop - queries.start
        assert own % (keys.stop - keys.start) == 0
        local_group = own // (keys.stop - keys.start)
        for place, head in enumerate(range(heads)[queries]):
            assert keys.start + place // local_group == head // group


def test_what_cannot_be_divided_is_said() -> None:
    with pytest.raises(ConfigError, match="--parallel-size 8 does not divide the model's 28 attention heads"):
        Ranks(0, 8).share(28, "attention heads")
    with pytest.raises(ConfigError, match="--parallel-size 3 does not divide"):
        Ranks(0, 3).share(4, "heads of keys", may_repeat=True)


def test_one_rank_holds_all_and_tells_nobody() -> None:
    x = torch.randn(3, 4)
    assert ALONE.share(7, "things") == slice(0, 7)
    assert ALONE.sum(x) is x
    assert ALONE.join_columns(x) is x
    assert ALONE.least(5, x.device) == 5
    ALONE.broadcast(x)


def test_a_cut_names_the_rows_that_it_keeps() -> None:
    rows: Mapping[str, slice | tuple[slice, ...]] = {"a": slice(1, 2), "c": (slice(3, 4), slice(6, 8))}
    assert Cut(rows).of(["a", "b", "c"]) == [(slice(1, 2),), (slice(None),), (slice(3, 4), slice(6, 8))]
    assert WHOLE.of(["a"]) == [(slice(None),)]
