"""What encoders elsewhere are asked and what they answer: msgspec, arrays by name or as plain bytes, never pickle."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.log_lines import LogStyle
from dashinfer_vlm.request import Grid
from dashinfer_vlm.shared_array import SharedArray, put

ROOM_TIMEOUT_S = 30.0
"""How long an array may wait for shared memory: items leave it as soon as they are encoded."""
_LOOK_S = 0.05

TensorDtype = Literal["uint8", "bfloat16", "float16", "float32", "float64"]


class TensorFile(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in shared memory. The file holds its bytes, since numpy has no bfloat16."""

    dtype: TensorDtype
    shape: tuple[int, ...]
    file: SharedArray


class Start(msgspec.Struct, frozen=True):
    """The first line of a new worker's standard input, as JSON."""

    address: str
    """ZeroMQ endpoint of the parent."""
    config: EngineConfig
    """Already turned to the worker's own device and threads."""
    folder: str
    """Where embeddings are put."""
    embedding_dtype: TensorDtype
    """What the engine computes in."""
    log: LogStyle


class Picture(msgspec.Struct, frozen=True, array_like=True):
    """One item as the ViT sees it."""

    patches: TensorFile
    grid: Grid
    content_hash: bytes
    num_rows: int
    """Rows of its embedding."""


class EncodeJob(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One batch; files that the worker makes for it are named `{id}-...`, so that the parent can remove them."""

    id: int
    pictures: tuple[Picture, ...]


class WorkerReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The ViT is loaded."""


class WorkerWaits(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """There is no place for the ViT now; `WorkerReady` follows when there is one."""

    why: str


class WorkerFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The ViT could not be loaded; the worker ends after this."""

    fault: Fault


class JobDone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    id: int
    embeddings: tuple[TensorFile, ...]


class JobRefused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    id: int
    message: str
    """For the log."""


Reply = WorkerReady | WorkerWaits | WorkerFailed | JobDone | JobRefused

job_decoder: msgspec.msgpack.Decoder[EncodeJob] = msgspec.msgpack.Decoder(EncodeJob)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def dtype_name(dtype: torch.dtype) -> TensorDtype:
    """What messages call it; raises msgspec.ValidationError for one that never travels."""
    name: TensorDtype = msgspec.convert(str(dtype).removeprefix("torch."), TensorDtype)
    return name


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """uint8 [bytes]: the tensor's memory, copied only when it is on a card or has gaps."""
    flat: np.ndarray = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return flat


def write_tensor(folder: Path, tensor: torch.Tensor, name: str) -> TensorFile:
    """Put a tensor that is not empty into the file `name` of `folder`.

    Waits for memory that others are about to give back; raises OSError when there is none within `ROOM_TIMEOUT_S`.
    """
    deadline = time.monotonic() + ROOM_TIMEOUT_S
    while True:
        try:
            return TensorFile(dtype_name(tensor.dtype), tuple(tensor.shape), put(folder, tensor_bytes(tensor), name))
        except OSError as error:
            if error.errno != errno.ENOSPC or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_S)


def read_tensor(shared: TensorFile) -> torch.Tensor:
    """A private copy; raises ValueError when shape and file disagree, FileNotFoundError when the file is gone."""
    content = torch.from_numpy(np.array(shared.file.open()))
    return content.view(getattr(torch, shared.dtype)).view(shared.shape)
