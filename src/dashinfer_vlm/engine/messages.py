"""What an engine is told and what it says, and how that travels between processes: msgspec, arrays by name, no pickle.

Commands go to the engine, events come from it; `engine/loop.py` obeys the ones and sends the others. A request that
crosses a process border becomes a `WireRequest`, whose arrays are files in shared memory that the sender owns.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from dashinfer_vlm import errors
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.request import Grid, Item, ItemKind, Output, Request, SamplingParams
from dashinfer_vlm.engine.stats import EngineStats
from dashinfer_vlm.shared_array import SharedArray, put


class EngineInfo(msgspec.Struct, frozen=True):
    """What is known of an engine once its model is loaded; constant for its life."""

    model: str
    """Folder, or id, that the weights came from."""
    max_model_len: int
    """Prompt plus output tokens of a request at most."""
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    """Of the stored weights, where they are not quantised."""
    kv_dtype: str
    block_size: int
    """Tokens in one block of the KV cache."""
    num_blocks: int
    max_num_seqs: int
    max_item_patches: int
    """Patches of one image or video that the encoder has memory for."""
    quant_type: str = "none"
    """How the text model's weights are quantised, as `--quant-type` says it."""
    vision_quant_type: str = "none"

    @property
    def precision(self) -> str:
        """What the weights are stored as, for a line that people read."""
        parts = (("", self.quant_type), ("vision ", self.vision_quant_type))
        quantised = [name + quant_type for name, quant_type in parts if quant_type != "none"]
        return " with ".join([self.dtype, " and ".join(quantised)] if quantised else [self.dtype])


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    request_id: str


class AskStats(msgspec.Struct, frozen=True, tag=True, array_like=True):
    ticket: int
    """Comes back in the answer."""


class Close(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Abort everything and end the loop."""


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """An exception on its way to another process or thread."""

    kind: str
    """Name of a class of `dashinfer_vlm.errors`."""
    message: str
    param: str | None = None
    retry_after_s: int = 1

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """Errors that this package raises on purpose keep their text; anything else is a failure of the engine."""
        if not isinstance(error, errors.DashInferError):
            return cls("EngineError", f"the engine failed ({type(error).__name__}); its log says more")
        param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", 1)
        return cls(type(error).__name__, str(error), param, retry_after_s)

    def error(self) -> errors.DashInferError:
        kind: type[errors.DashInferError] = getattr(errors, self.kind)
        if issubclass(kind, errors.InvalidRequestError):
            return kind(self.message, param=self.param)
        if issubclass(kind, errors.OverloadedError):
            return kind(self.message, retry_after_s=self.retry_after_s)
        return kind(self.message)


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


class WireRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`Request` with its arrays by name."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    items: tuple[WireItem, ...]
    positions: SharedArray | None


class Start(msgspec.Struct, frozen=True):
    """The first line of a new engine process's standard input, as JSON."""

    address: str
    """ZeroMQ endpoint of the parent."""
    config: EngineConfig
    log_level: int


Command = Request | Abort | AskStats | Close
WireCommand = WireRequest | Abort | AskStats | Close
Event = Outputs | Refused | StatsReply | Failed
WireEvent = Outputs | Refused | StatsReply | Progress | Ready | Failed

command_decoder: msgspec.msgpack.Decoder[WireCommand] = msgspec.msgpack.Decoder(WireCommand)
event_decoder: msgspec.msgpack.Decoder[WireEvent] = msgspec.msgpack.Decoder(WireEvent)


def to_wire(request: Request, folder: Path) -> tuple[WireRequest, list[SharedArray]]:
    """Copy the arrays of `request` that are not shared yet into `folder`; the caller removes those returned."""
    made: list[SharedArray] = []

    def share(array: torch.Tensor | np.ndarray | None) -> SharedArray | None:
        if array is None:
            return None
        made.append(put(folder, _as_numpy(array)))
        return made[-1]

    items = tuple(
        WireItem(
            kind=item.kind,
            start=item.start,
            num_tokens=item.num_tokens,
            content_hash=item.content_hash,
            grid=item.grid,
            patches=item.patches if isinstance(item.patches, SharedArray) else share(item.patches),
            embedding=share(item.embedding),
            embedding_dtype=None if item.embedding is None else str(item.embedding.dtype).removeprefix("torch."),
            seconds_per_grid=item.seconds_per_grid,
        )
        for item in request.items
    )
    wire = WireRequest(request.id, request.prompt_ids, request.params, items, share(request.positions))
    return wire, made


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
        )
        for item in wire.items
    )
    positions = None if wire.positions is None else map_tensor(wire.positions)
    return Request(id=wire.id, prompt_ids=wire.prompt_ids, params=wire.params, items=items, positions=positions)


def map_tensor(shared: SharedArray) -> torch.Tensor:
    """Map a shared array as a tensor without a copy; the mapping outlives the file's name.

    Writes stay private to the mapping (copy on write): torch has no read-only tensors.
    """
    return torch.from_numpy(np.memmap(shared.path, dtype=shared.dtype, mode="c", shape=shared.shape))


def _as_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu().contiguous()
    return array.view(torch.int16).numpy() if array.dtype == torch.bfloat16 else array.numpy()


def _embedding(item: WireItem) -> torch.Tensor | None:
    if item.embedding is None or item.embedding_dtype is None:
        return None
    return map_tensor(item.embedding).view(getattr(torch, item.embedding_dtype))
