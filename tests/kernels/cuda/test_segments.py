"""Attention inside packed segments against the reference in float64."""

from __future__ import annotations

import gc
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dashinfer_vlm.kernels.cuda import segments
from dashinfer_vlm.kernels.cuda.segments import segment_tiles, varlen_attention
from dashinfer_vlm.layers import attention
from tests.kernels.cuda.numbers import DEVICE, TYPES, allowed, error


def packed(lengths: list[int], heads: int = 2, dim: int = 80, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k and v as views of one projection, and the starts."""
    qkv = torch.randn(sum(lengths), 3 * heads, dim).to(DEVICE, dtype)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return *torch.split(qkv, heads, dim=1), starts


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [80, 64, 72, 128, 16])
def test_frames_of_different_sizes(dtype: torch.dtype, dim: int) -> None:
    q, k, v, starts = packed([37, 1, 64, 5], 2, dim, dtype)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < allowed(dtype)


def test_frames_longer_than_a_tile() -> None:
    q, k, v, starts = packed([300, 129, 128], 1, 80, torch.bfloat16)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < 1e-2


def test_windows() -> None:
    q, k, v, starts = packed([16, 16, 8, 16, 4, 8], 2, 80, torch.bfloat16)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < 1e-2


@pytest.mark.parametrize("part", [slice(0, 10), slice(7, 60), slice(40, 41)])
def test_a_part_of_the_queries(part: slice) -> None:
    q, k, v, starts = packed([30, 11, 30])
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)[part]
    assert error(varlen_attention(q[part], k, v, starts, 0.3, part.start), want) < 1e-5


def test_no_rows_at_all() -> None:
    q, k, v, _ = packed([3])
    assert varlen_attention(q[:0], k[:0], v[:0], torch.zeros(1, dtype=torch.int32, device=DEVICE), 0.3).shape == (
        0,
        2,
        80,
    )


def test_scores_that_are_all_far_below_zero() -> None:
    q, k, v, starts = packed([40, 30], dim=16)
    q, k = -q.abs() * 1e3, k.abs()
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < 1e-4


@pytest.mark.parametrize("lengths", [[300, 129, 128, 1], [64] * 5, [0, 5, 0]])
@pytest.mark.parametrize(("first", "last"), [(0, None), (3, 4), (100, 290)])
def test_tiles_hold_every_row_once_and_never_two_segments(lengths: list[int], first: int, last: int | None) -> None:
    starts = [0, *accumulate(lengths)]
    stop = min(starts[-1] if last is None else last, starts[-1])
    first = min(first, stop)
    tiles = segment_tiles(torch.tensor(starts, dtype=torch.int32), first, stop, 64).tolist()
    rows = [row for begin, end, *_ in tiles for row in range(begin, end)]
    assert sorted(rows) == list(range(first, stop))
    segments = list(pairwise(starts))
    for begin, end, *segment in tiles:
        assert begin == end or (tuple(segment) in segments and segment[0] <= begin < end <= min(begin + 64, segment[1]))


def test_tiles_are_made_once_for_all_blocks_and_no_longer_kept_than_their_segments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counting(starts: Tensor, *where: int) -> Tensor:
        made.append(len(starts))
        return segment_tiles(starts, *where)

    monkeypatch.setattr(segments, "segment_tiles", counting)
    q, k, v = (torch.randn(9, 1, 16, device=DEVICE) for _ in range(3))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    kept = len(segments._TILES)
    outputs = [varlen_attention(q, k, v, starts, 0.1) for _ in range(3)]
    assert made == [3]
    assert torch.equal(outputs[0], outputs[2])
    other = torch.tensor([0, 2, 9], dtype=torch.int32, device=DEVICE)
    want = attention.varlen_attention(q, k, v, other, 0.1)
    assert error(varlen_attention(q, k, v, other, 0.1), want) < 1e-5
    assert made == [3, 3]
    assert len(segments._TILES) == kept + 2
    del starts, other
    gc.collect()
    assert len(segments._TILES) == kept
