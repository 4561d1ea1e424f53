"""Arrays that came by name, as tensors of this process: the receiving half of `wire.py`. Only they need torch, so that
a request of ids alone is read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dashinfer_vlm.engine.host.wire import WireItem, WireRequest
from dashinfer_vlm.request import Item, Request
from dashinfer_vlm.shared_array import SharedArray

if TYPE_CHECKING:
    import torch

__all__ = ["from_wire", "map_tensor"]


def from_wire(wire: WireRequest) -> Request:
    """The request with its embeddings and positions mapped; raises FileNotFoundError when the sender took them back.

    Patches stay names: the loop maps them for requests from every side (`with_mapped_patches`).
    """
    items = tuple(
        Item(
            kind=item.kind,
            start=item.start,
            num_tokens=item.num_tokens,
            content_hash=item.content_hash,
            grid=item.grid,
            patches=item.patches,
            embedding=_embedding(item),
            seconds_per_grid=item.seconds_per_grid,
            first_row=item.first_row,
            encoded_rows=item.encoded_rows,
        )
        for item in wire.items
    )
    positions = None if wire.positions is None else map_tensor(wire.positions)
    return Request(
        id=wire.id,
        prompt_ids=wire.prompt_ids,
        params=wire.params,
        items=items,
        positions=positions,
        cache_salt=wire.cache_salt,
        priority=wire.priority,
        tenant=wire.tenant,
        weight=wire.weight,
    )


def map_tensor(shared: SharedArray) -> torch.Tensor:
    """Map a shared array as a tensor without a copy; the mapping outlives the file's name.

    Writes stay private to the mapping (copy on write): torch has no read-only tensors.
    """
    import torch

    return torch.from_numpy(np.memmap(shared.path, dtype=shared.dtype, mode="c", shape=shared.shape))


def _embedding(item: WireItem) -> torch.Tensor | None:
    if item.embedding is None or item.embedding_dtype is None:
        return None
    import torch

    return map_tensor(item.embedding).view(getattr(torch, item.embedding_dtype))
