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


@pytest.fixture(autouse=True, params=["as served", "by descriptors", "by pointers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two kernels attends: the one for tall tiles does windows as well, and the other one frames."""
    found: str = request.param
    if found == "by descriptors":
        monkeypatch.setattr(segments, "is_short", lambda *_: False)
    elif found == "by pointers":
        monkeypatch.setattr(segments, "has_tiles", lambda _: False)
    return found


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


@pytest.mark.parametrize("dim", [80, 64, 72, 128, 40])
def test_frames_longer_than_a_tile(dim: int) -> None:
    q, k, v, starts = packed([300, 129, 128], 2, dim, torch.bfloat16)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < 1e-2


def test_windows() -> None:
    q, k, v, starts = packed([16, 16, 8, 16, 4, 8], 2, 80, torch.bfloat16)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < 1e-2


@pytest.mark.parametrize("part", [slice(0, 10), slice(7, 60), slice(40, 41)])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_part_of_the_queries_and_of_the_heads(dtype: torch.dtype, part: slice) -> None:
    q, k, v, starts = packed([30, 11, 30], 3, 72, dtype)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for heads in (slice(0, 1), slice(1, 3)):
        varlen_attention(q[part, heads], k[:, heads], v[:, heads], starts, 0.3, part.start, out[part, heads])
    assert error(out[part], want[part]) < allowed(dtype)


@pytest.mark.parametrize("lengths", [[40, 100, 24], [300, 1, 163]])
def test_what_is_not_a_number_stays_in_its_segment(lengths: list[int]) -> None:
    """Tiles of keys reach into the next segment."""
    q, k, v, starts = packed(lengths, 2, 80, torch.bfloat16)
    mine = slice(0, lengths[0])
    want = attention.varlen_attention(q[mine].double(), k[mine].double(), v[mine].double(), starts[:2], 0.3)
    k[lengths[0] :] = torch.nan
    v[lengths[0] :] = torch.inf
    assert error(varlen_attention(q, k, v, starts, 0.3)[mine], want) < 1e-2


def test_rows_that_the_copy_engine_cannot_read() -> None:
    """They begin between multiples of 16 bytes, or heads do not lie side by side."""
    q, k, v, starts = packed([130, 150], 2, 72, torch.bfloat16)
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    odd = torch.empty(280, 2 * 72 + 1, dtype=k.dtype, device=DEVICE)[:, 1:].view(280, 2, 72).copy_(k)
    apart = torch.empty(280, 2, 80, dtype=v.dtype, device=DEVICE)[:, :, :72].copy_(v)
    assert not segments.can_tile(odd)
    assert not segments.can_tile(apart)
    assert error(varlen_attention(q, odd, v, starts, 0.3), want) < 1e-2
    assert error(varlen_attention(q, k, apart, starts, 0.3), want) < 1e-2


@pytest.mark.parametrize(("dim", "dtype"), [(80, torch.bfloat16), (72, torch.float16), (80, torch.float32)])
def test_pictures_of_16_bits_are_attended_to_by_descriptors(
    dim: int, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[object] = []
    monkeypatch.setattr(segments, "launch", lambda kernel, *_, **__: launched.append(kernel))
    q, k, v, starts = packed([128, 130], 2, dim, dtype)
    varlen_attention(q, k, v, starts, 0.3)
    is_tiled = dtype != torch.float32 and way != "by pointers"
    assert launched == [segments._attend_tall if is_tiled else segments._attend]


def test_windows_are_attended_to_by_pointers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    monkeypatch.setattr(segments, "launch", lambda kernel, *_, **__: launched.append(kernel))
    q, k, v, starts = packed([64] * 4, 2, 80, torch.bfloat16)
    varlen_attention(q, k, v, starts, 0.3)
    assert launched == [segments._attend_tall if way == "by descriptors" else segments._attend]


def test_no_rows_at_all() -> None:
    q, k, v, _ = packed([3])
    assert varlen_attention(q[:0], k[:0], v[:0], torch.zeros(1, dtype=torch.int32, device=DEVICE), 0.3).shape == (
        0,
        2,
        80,
    )


@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.float32), (32, torch.float16)])
def test_scores_that_are_all_far_below_zero(dim: int, dtype: torch.dtype) -> None:
    q, k, v, starts = packed([40, 30], dim=dim, dtype=dtype)
    q, k = -q.abs() * 1e3, k.abs()
    want = attention.varlen_attention(q.double(), k.double(), v.double(), starts, 0.3)
    assert error(varlen_attention(q, k, v, starts, 0.3), want) < max(allowed(dtype), 1e-4)


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
