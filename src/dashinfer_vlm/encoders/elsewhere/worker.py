"""A vision worker: `python -m dashinfer_vlm.encoders.elsewhere.worker`, started by `process.ProcessEncoder` and by
nobody else.

Standard input carries one line of JSON (`wire.Start`) and then stays open for the parent's life: its end means that
the parent is gone or done, and so is this process. Jobs and replies go over one ZeroMQ pair, arrays in shared memory.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
import zmq

from dashinfer_vlm.child_process import exit_with_parent
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.cores import parse_list
from dashinfer_vlm.encoders.elsewhere.wire import (
    EncodeJob,
    JobDone,
    JobRefused,
    Picture,
    Reply,
    Start,
    WorkerFailed,
    WorkerReady,
    WorkerWaits,
    job_decoder,
    read_tensor,
    write_tensor,
)
from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.kernels.threads import set_threads, stay_on
from dashinfer_vlm.models.base import VisionEncoder
from dashinfer_vlm.models.loading import load_encoder
from dashinfer_vlm.request import Grid
from dashinfer_vlm.shared_array import leave

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[Picture], Sequence[torch.Tensor]], list[torch.Tensor]]
"""One [tokens_i, hidden] for each picture and its uint8 [P_i, patch_dim]."""
Loader = Callable[[Start, Callable[[str], None]], Encode]
"""Gets a function to say why it has to wait."""

_SLICES = 1 << 30
_LINGER_MS = 2000


def serve(load: Loader) -> int:
    """Be the worker: load, then encode one job after the other until the parent ends it. Returns the exit status."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    exit_with_parent(0, leave)
    start.log.apply()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(start.address)
    try:
        encode = load(start, lambda why: socket.send(msgspec.msgpack.encode(WorkerWaits(why))))
    except Exception as error:
        if not isinstance(error, DashInferError):
            logger.exception("loading the vision encoder failed")
        socket.send(msgspec.msgpack.encode(WorkerFailed(Fault.of(error))))
        context.destroy(linger=_LINGER_MS)
        return 1
    socket.send(msgspec.msgpack.encode(WorkerReady()))
    while True:
        job = job_decoder.decode(socket.recv())
        socket.send(msgspec.msgpack.encode(_do(job, encode, start)))


def encode_at_once(
    encoder: VisionEncoder, patches: Sequence[torch.Tensor], grids: Sequence[Grid]
) -> list[torch.Tensor]:
    """The three verbs at once: nobody else wants this device between the slices."""
    with torch.inference_mode():
        state = encoder.begin(patches, grids)
        while not state.done:
            encoder.run(state, _SLICES)
        return encoder.finish(state)


def load_with_threads(config: EngineConfig) -> VisionEncoder:
    """The ViT of `config.model` on its device; `config.threads` and `config.cores` hold for the whole process."""
    if config.threads is not None:
        cores = None if config.cores is None else parse_list(config.cores)
        set_threads(config.threads, cores)
        stay_on(cores)
    return load_encoder(config)


def load_here(start: Start, wait: Callable[[str], None]) -> Encode:
    """The ViT in this process."""
    return partial(_encode_here, load_with_threads(start.config))


def _encode_here(
    encoder: VisionEncoder, pictures: Sequence[Picture], patches: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    return encode_at_once(encoder, patches, [picture.grid for picture in pictures])


def _do(job: EncodeJob, encode: Encode, start: Start) -> Reply:
    try:
        embeddings = encode(job.pictures, [read_tensor(picture.patches) for picture in job.pictures])
        dtype, folder = getattr(torch, start.embedding_dtype), Path(start.folder)
        files = [write_tensor(folder, e.to(dtype), f"{job.id}-embedding-{i}") for i, e in enumerate(embeddings)]
        return JobDone(job.id, tuple(files))
    except Exception as error:
        logger.exception("a batch of %d items failed", len(job.pictures))
        return JobRefused(job.id, f"{type(error).__name__}: {error}")


def main() -> int:
    return serve(load_here)


if __name__ == "__main__":
    sys.exit(main())
