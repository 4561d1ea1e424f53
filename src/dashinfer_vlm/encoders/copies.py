"""Patches on their way to a card, copied by a thread that is not the engine's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from dashinfer_vlm.encoders.queue import raw_patches
from dashinfer_vlm.request import Item

__all__ = ["PatchCopies"]

MakeBuffer = Callable[[tuple[int, ...]], torch.Tensor]
_pinned = partial(torch.empty, dtype=torch.uint8, pin_memory=True)


class PatchCopies:
    """Copies in memory that a card reads without the host, by content hash. Belongs to the engine's thread.

    A copy is begun when an item is asked for, so that it is there when its batch begins. There are as many as there are
    items that wait, each of which keeps its shared file mapped.
    """

    def __init__(self, make_buffer: MakeBuffer = _pinned) -> None:
        """`make_buffer` gives uint8 CPU memory of a shape."""
        self._make_buffer = make_buffer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="patches")
        self._begun: dict[bytes, Future[torch.Tensor]] = {}

    def begin(self, item: Item) -> None:
        self._begun[item.content_hash] = self._thread.submit(self._copy, item)

    def give_up(self, item: Item) -> None:
        """The copy is not wanted any more, if there is one."""
        if (copy := self._begun.pop(item.content_hash, None)) is not None:
            copy.cancel()

    def take(self, item: Item) -> torch.Tensor:
        """uint8 [P, patch_dim], once it is made; made now if nobody has begun it. What is on a card already is handed
        through. Raises what the copy has failed with."""
        copy = self._begun.pop(item.content_hash, None)
        return self._copy(item) if copy is None else copy.result()

    def close(self) -> None:
        """End the thread; idempotent."""
        self._thread.shutdown(cancel_futures=True)
        self._begun.clear()

    def _copy(self, item: Item) -> torch.Tensor:
        patches = raw_patches(item)
        if isinstance(patches, torch.Tensor) and patches.device.type != "cpu":
            return patches
        copy = self._make_buffer(tuple(patches.shape))
        np.copyto(copy.numpy(), patches)  # other threads run meanwhile
        return copy
