"""What an engine is told and what it says, and how that travels between processes: msgspec, arrays by name, no pickle.

Commands go to the engine, events come from it; `loop.py` obeys the ones and sends the others. A request that
crosses a process border becomes a `WireRequest`, whose arrays are files in shared memory that the sender owns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.log_lines import LogStyle
from dashinfer_vlm.request import Grid, Item, ItemKind, Output, Request, SamplingParams
from dashinfer_vlm.shared_array import SharedArray, put

if TYPE_CHECKING:
    import torch


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    request_id: str


class AskStats(msgspec.Struct, frozen=True, tag=True, array_like=True):
    ticket: int
    """Comes back in the answer."""


class Close(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Abort everything and end the loop."""


class Outputs(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The news of one step, all requests together."""

    outputs: list[Output]


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A request that was not accepted; no Output follows."""

    request_id: str
    fault: Fault


class StatsReply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    ticket: int
    stats: EngineStats


class Progress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How far loading has come."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The model could not be loaded, or the loop gave up; the engine ends after this."""

    fault: Fault


class WireItem(msgspec.Struct, frozen=True, array_like=True):
    """`Item` with its arrays by name."""

    kind: ItemKind
    start: int
    num_tokens: int
    content_hash: bytes
    grid: Grid | None
    patches: SharedArray | None
    embedding: SharedArray | None
    embedding_dtype: str | None
    """Name of the torch dtype; the file holds its bytes, since numpy has no bfloat16."""
    seconds_per_grid: float
    first_row: int
    encoded_rows: int | None


class WireRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`Request` with its arrays by name."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    items: tuple[WireItem, ...]
    positions: SharedArray | None
    cache_salt: str
    priority: int
    tenant: str
    weight: float
    wants_vector: bool


class Start(msgspec.Struct, frozen=True):
    """The first line of a new engine process's standard input, as JSON."""

    address: str
    """ZeroMQ endpoint of the parent."""
    config: EngineConfig
    log: LogStyle


_Share = Callable[["torch.Tensor | np.ndarray | None"], SharedArray | None]

Command = Request | Abort | AskStats | Close
WireCommand = WireRequest | Abort | AskStats | Close
Event = Outputs | Refused | StatsReply | Failed
WireEvent = Outputs | Refused | StatsReply | Progress | Ready | Failed

command_decoder: msgspec.msgpack.Decoder[WireCommand] = msgspec.msgpack.Decoder(WireCommand)
event_decoder: msgspec.msgpack.Decoder[WireEvent] = msgspec.msgpack.Decoder(WireEvent)


def to_wire(request: Request, folder: Path) -> tuple[WireRequest, list[SharedArray]]:
    """Copy the arrays of `request` that are not shared yet into `folder`; the caller removes those returned.

    Raises as `shared_array.put` does, and leaves nothing in the folder then.
    """
    made: list[SharedArray] = []

    def share(array: torch.Tensor | np.ndarray | None) -> SharedArray | None:
        if array is None:
            return None
        made.append(put(folder, _as_numpy(array)))
        return made[-1]

    try:
        return _wire_request(request, share), made
    except BaseException:
        for array in made:
            array.remove()
        raise


def _wire_request(request: Request, share: _Share) -> WireRequest:
    return WireRequest(
        request.id,
        request.prompt_ids,
        request.params,
        tuple(_wire_item(item, share) for item in request.items),
        share(request.positions),
        request.cache_salt,
        request.priority,
        request.tenant,
        request.weight,
        request.wants_vector,
    )


def _wire_item(item: Item, share: _Share) -> WireItem:
    return WireItem(
        kind=item.kind,
        start=item.start,
        num_tokens=item.num_tokens,
        content_hash=item.content_hash,
        grid=item.grid,
        patches=item.patches if isinstance(item.patches, SharedArray) else share(item.patches),
        embedding=item.embedding if isinstance(item.embedding, SharedArray) else share(item.embedding),
        embedding_dtype=_dtype_name(item.embedding),
        seconds_per_grid=item.seconds_per_grid,
        first_row=item.first_row,
        encoded_rows=item.encoded_rows,
    )


def _dtype_name(embedding: torch.Tensor | SharedArray | None) -> str | None:
    if embedding is None:
        return None
    if isinstance(embedding, SharedArray):
        return str(np.dtype(embedding.dtype).name)
    return str(embedding.dtype).removeprefix("torch.")


def _as_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    import torch  # whoever brings a tensor has it

    array = array.detach().cpu().contiguous()
    return array.view(torch.int16).numpy() if array.dtype == torch.bfloat16 else array.numpy()
