"""The embedding cache in memory: its budget, its order, its pins."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashinfer_vlm.encoders.cache import EmbeddingCache
from tests.searching import searched

ROW_BYTES = 8


def rows(num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens, 2, dtype=torch.float32)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(3 * ROW_BYTES)
    for number in range(3):
        cache.put(key(number), rows(1))
    cache.get(key(0))
    cache.put(key(3), rows(1))
    assert [number for number in range(4) if key(number) in cache] == [0, 2, 3]
    assert cache.num_bytes == 3 * ROW_BYTES


def test_what_is_pinned_stays_beyond_the_budget_and_goes_with_its_last_pin() -> None:
    cache = EmbeddingCache(0)
    cache.pin(key(1))
    cache.pin(key(1))
    cache.put(key(1), rows(4))
    cache.put(key(2), rows(4))
    assert (key(1) in cache, key(2) in cache) == (True, False)
    cache.unpin(key(1))
    assert key(1) in cache
    cache.unpin(key(1))
    assert key(1) not in cache
    assert cache.num_bytes == 0


def test_a_part_of_a_larger_tensor_does_not_keep_the_whole() -> None:
    cache = EmbeddingCache(100 * ROW_BYTES)
    batch = torch.arange(200.0).view(100, 2)
    cache.put(key(1), batch[3:5])
    kept = cache.get(key(1))
    assert kept is not None
    assert torch.equal(kept, batch[3:5])
    assert kept.untyped_storage().nbytes() == cache.num_bytes == 2 * ROW_BYTES


def test_a_whole_tensor_is_not_copied() -> None:
    cache = EmbeddingCache(100 * ROW_BYTES)
    embedding = rows(3)
    cache.put(key(1), embedding)
    assert cache.get(key(1)) is embedding


@searched(200)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "pin", "unpin"]), st.integers(0, 5)), max_size=60))
def test_random_lives_keep_the_books(moves: list[tuple[str, int]]) -> None:
    cache = EmbeddingCache(5 * ROW_BYTES)
    pins = dict.fromkeys(range(6), 0)
    for move, number in moves:
        if move == "put":
            cache.put(key(number), rows(number + 1))
        elif move == "get":
            cache.get(key(number))
        elif move == "pin":
            cache.pin(key(number))
            pins[number] += 1
        elif pins[number]:
            cache.unpin(key(number))
            pins[number] -= 1
        cache.check_integrity()
        assert all(cache.is_pinned(key(n)) == (pins[n] > 0) for n in pins)
