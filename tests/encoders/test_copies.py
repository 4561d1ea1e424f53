"""Patches on their way to a card: one copy, off the engine's thread, which nobody waits for before its batch begins."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.copies import PatchCopies
from dashinfer_vlm.encoders.in_step import InStepEncoder
from dashinfer_vlm.encoders.queue import ItemQueue
from dashinfer_vlm.request import Item
from tests.encoders.told import TIMEOUT_S, item
from tests.engine.scripted_model import ScriptedEncoder


class Memory:
    """Makes buffers when it may, and knows for which threads."""

    def __init__(self) -> None:
        self.asked, self.may_go_on = threading.Semaphore(0), threading.Event()
        self.may_go_on.set()
        self.threads: list[str] = []
        self.is_full = False

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.threads.append(threading.current_thread().name)
        self.asked.release()
        assert self.may_go_on.wait(TIMEOUT_S)
        if self.is_full:
            raise RuntimeError("no pinned memory is left")
        return torch.empty(shape, dtype=torch.uint8)

    @property
    def num_here(self) -> int:
        return self.threads.count(threading.current_thread().name)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def stage(memory: Memory) -> Iterator[InStepEncoder]:
    """As on a card, but for the memory."""
    stage = InStepEncoder(ScriptedEncoder(), ItemQueue(EmbeddingCache(1 << 20)), torch.device("cpu"), 1024)
    stage._copies = PatchCopies(memory)
    yield stage
    memory.may_go_on.set()
    stage.close()


def picture(number: int) -> Item:
    return replace(item(number), patches=torch.full((4, 2), number, dtype=torch.uint8))


def encoded(stage: InStepEncoder, number: int) -> float:
    """What the scripted encoder has made of it: the sum of its patches."""
    embedding = stage.cache.get(picture(number).content_hash)
    assert isinstance(embedding, torch.Tensor)
    return float(embedding.item())


def finish(stage: InStepEncoder) -> None:
    while stage.has_work():
        stage.advance(1.0)


def test_copies_are_made_by_another_thread_while_the_engine_goes_on(stage: InStepEncoder, memory: Memory) -> None:
    memory.may_go_on.clear()
    for number in (1, 2, 1):
        stage.request(picture(number))
    assert memory.asked.acquire(timeout=TIMEOUT_S)
    memory.may_go_on.set()
    finish(stage)
    assert [encoded(stage, number) for number in (1, 2)] == [8.0, 16.0]
    assert (len(memory.threads), memory.num_here) == (2, 0), "once for each content"


def test_the_shared_file_is_not_read_when_a_batch_begins(stage: InStepEncoder, memory: Memory) -> None:
    patches = np.full((4, 2), 3, np.uint8)
    stage.request(replace(picture(3), patches=patches))
    stage.request(picture(4))
    for _ in range(2):  # one thread: the first copy is made when the second is begun
        assert memory.asked.acquire(timeout=TIMEOUT_S)
    patches[:] = 0
    finish(stage)
    assert encoded(stage, 3) == 24.0


def test_a_copy_that_nobody_wants_any_more_is_not_made(stage: InStepEncoder, memory: Memory) -> None:
    memory.may_go_on.clear()
    for number in (1, 2):
        stage.request(picture(number))
    assert memory.asked.acquire(timeout=TIMEOUT_S)
    stage.release(picture(2))
    stage.release(picture(1))
    memory.may_go_on.set()
    stage.request(picture(3))
    finish(stage)
    assert encoded(stage, 3) == 24.0
    assert len(memory.threads) == 2, "the one under way, and the last"


def test_a_copy_that_fails_costs_its_item_alone(stage: InStepEncoder, memory: Memory) -> None:
    memory.is_full = True
    stage.request(picture(1))
    assert memory.asked.acquire(timeout=TIMEOUT_S)
    assert stage._copies is not None
    failed = stage._copies._begun[picture(1).content_hash].exception(TIMEOUT_S)
    assert isinstance(failed, RuntimeError)
    memory.is_full = False
    bad = replace(picture(2), patches=torch.zeros(4, 2, dtype=torch.float32))  # cannot be copied as bytes
    stage.request(bad)
    stage.request(picture(3))
    finish(stage)
    assert stage.take_failures().keys() == {bad.content_hash}
    assert [encoded(stage, number) for number in (1, 3)] == [8.0, 24.0]


def test_what_is_on_a_card_is_not_copied(memory: Memory) -> None:
    copies, there = PatchCopies(memory), torch.zeros(4, 2, dtype=torch.uint8, device="meta")
    copies.begin(replace(picture(1), patches=there))
    assert copies.take(replace(picture(1), patches=there)) is there
    copies.close()
    assert not memory.threads


def test_the_thread_ends_with_the_stage(stage: InStepEncoder) -> None:
    stage.request(picture(1))
    assert any(thread.name.startswith("patches") for thread in threading.enumerate())
    stage.close()
    stage.close()
    assert not any(thread.name.startswith("patches") for thread in threading.enumerate())
