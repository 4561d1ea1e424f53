"""The queue of items that are to be encoded: order, sharing, retries, ends."""

from __future__ import annotations

import torch

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.queue import ItemQueue
from dashinfer_vlm.request import Item

LARGE = 1000


def item(number: int, num_tokens: int = 1) -> Item:
    patches = torch.zeros(num_tokens * 4, 2, dtype=torch.uint8)
    return Item(
        kind="image",
        start=0,
        num_tokens=num_tokens,
        content_hash=bytes([number]) * 32,
        grid=(1, 2, num_tokens * 2),
        patches=patches,
    )


def queue_of(*items: Item) -> ItemQueue:
    queue = ItemQueue(EmbeddingCache(1 << 20))
    for each in items:
        queue.request(each)
    return queue


def test_a_batch_is_cut_at_the_patch_limit_and_its_first_item_may_exceed_it() -> None:
    first, second, third = item(1, 3), item(2, 1), item(3, 1)
    queue = queue_of(first, second, third)
    assert queue.num_waiting_patches == 20
    assert queue.take(8) == [first]
    assert queue.take(8) == [second, third]
    assert queue.take(8) == []


def test_content_in_flight_is_not_encoded_a_second_time() -> None:
    queue = queue_of(item(1))
    (taken,) = queue.take(LARGE)
    queue.request(item(1))
    assert not queue.has_waiting()
    queue.store([taken], [torch.zeros(1, 4)])
    assert (queue.cache.hits, queue.cache.misses, queue.num_encoded, queue.num_patches) == (1, 1, 1, 4)


def test_what_nobody_wants_any_more_is_not_waiting() -> None:
    queue = queue_of(item(1))
    queue.release(item(1))
    assert not queue.has_waiting()


def test_a_batch_that_fails_is_tried_item_by_item_and_what_fails_alone_is_given_up() -> None:
    good, bad = item(1), item(2)
    queue = queue_of(good, bad)
    queue.fail(queue.take(LARGE), ValueError("one of them"))
    assert queue.take_failures() == {}
    assert queue.take(LARGE) == [good]
    queue.store([good], [torch.zeros(1, 4)])
    assert queue.take(LARGE) == [bad]
    queue.fail([bad], ValueError("this one"))
    assert queue.take_failures() == {bad.content_hash: "the image could not be encoded"}
    assert queue.take_failures() == {}
    assert (queue.num_retries, queue.num_failures, queue.has_waiting()) == (2, 1, False)


def test_an_item_over_which_two_encoders_died_is_given_up() -> None:
    good, bad = item(1), item(2)
    queue = queue_of(good, bad)
    queue.lost(queue.take(LARGE), blamed=True)
    assert queue.take(LARGE) == [good]
    queue.store([good], [torch.zeros(1, 4)])
    queue.lost(queue.take(LARGE), blamed=True)
    assert queue.take_failures().keys() == {bad.content_hash}
    assert not queue.has_waiting()


def test_a_batch_that_no_encoder_had_begun_stays_a_batch() -> None:
    queue = queue_of(item(1), item(2))
    for _ in range(3):
        queue.lost(queue.take(LARGE), blamed=False)
    assert len(queue.take(LARGE)) == 2
    assert queue.num_retries == 0


def test_suspects_are_passed_over_where_they_could_do_harm() -> None:
    suspect, clean = item(1), item(2)
    queue = queue_of(suspect)
    queue.lost(queue.take(LARGE), blamed=True)
    assert not queue.has_waiting(suspects=False)
    queue.request(clean)
    assert queue.take(LARGE, suspects=False) == [clean]
    assert queue.take(LARGE) == [suspect]


def test_a_lost_item_that_nobody_wants_is_not_tried_again() -> None:
    queue = queue_of(item(1))
    taken = queue.take(LARGE)
    queue.release(taken[0])
    queue.lost(taken, blamed=True)
    assert not queue.has_waiting()


def test_a_new_request_for_content_that_was_given_up_starts_afresh() -> None:
    bad = item(1)
    queue = queue_of(bad)
    queue.fail(queue.take(LARGE), ValueError("no"))
    queue.release(bad)
    queue.request(bad)
    assert queue.take(LARGE) == [bad]


def test_an_embedding_with_a_wrong_number_of_rows_fails_its_item() -> None:
    queue = queue_of(item(1, 2))
    queue.store(queue.take(LARGE), [torch.zeros(3, 4)])
    assert queue.num_failures == 1
    assert queue.num_encoded == 0
