"""Arrays that came by name, as tensors of this process: the receiving half of `wire.py`. Only they need torch, so that
a request of ids alone is read without it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dashinfer_vlm.engine.host.wire import WireItem, WireRequest
from dashinfer_vlm.errors import EngineError
from dashinfer_vlm.request import Item, Request
from dashinfer_vlm.shared_array import SharedArray

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

__all__ = ["from_wire", "lost_arrays", "map_tensor"]


def from_wire(wire: WireRequest) -> Request:
    """The request with its embeddings and positions mapped; raises OSError as `map_tensor` does.

    Patches stay names: the loop maps them for requests from every side.
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
        wants_vector=wire.wants_vector,
    )


def map_tensor(shared: SharedArray) -> torch.Tensor:
    """Map a shared array as a tensor without a copy; the mapping outlives the file's name, and holds no open file: of
    those a process has few beside the pictures that may wait.

    Writes stay private to the mapping (copy on write): torch has no read-only tensors. Raises FileNotFoundError when
    the owner has removed it, and OSError when it cannot be mapped.
    """
    import torch

    try:
        flat = torch.from_file(shared.path, shared=False, size=shared.nbytes, dtype=torch.uint8)
    except RuntimeError as error:  # torch's for whatever the system says
        kind = OSError if Path(shared.path).exists() else FileNotFoundError
        raise kind(f"an array of shape {shared.shape} cannot be mapped: {error}") from error
    dtype = torch.from_numpy(np.empty(0, shared.dtype)).dtype
    return flat.view(dtype).view(shared.shape)


def lost_arrays(request_id: str, error: OSError) -> EngineError:
    """What is told of a request whose arrays are not to be had."""
    if isinstance(error, FileNotFoundError):
        return EngineError(f"the arrays of request {request_id} were removed before the engine saw them")
    logger.error("request %s: %s", request_id, error)  # which names the file, as nobody outside is to know it
    return EngineError(f"the arrays of request {request_id} cannot be read; the engine's log says more")


def _embedding(item: WireItem) -> torch.Tensor | None:
    if item.embedding is None or item.embedding_dtype is None:
        return None
    import torch

    return map_tensor(item.embedding).view(getattr(torch, item.embedding_dtype))
