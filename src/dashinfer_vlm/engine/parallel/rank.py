"""A rank of a model that several processes share: `python -m dashinfer_vlm.engine.parallel.rank`, started by
`crew.RankProcesses` and by nobody else.

Standard input carries one line of JSON (`wire.Start`) and then stays open for the parent's life: its end means that
the parent is gone or done, and so is this process. Orders come over one ZeroMQ pair; whatever fails ends the process,
and by that the engine: the ranks cannot be brought together again.
"""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from dashinfer_vlm.child_process import exit_with_parent
from dashinfer_vlm.engine.cards.calls import ModelCalls
from dashinfer_vlm.engine.devices import captures_graphs, step_shapes
from dashinfer_vlm.engine.load import make_cache
from dashinfer_vlm.engine.parallel.meeting import meet
from dashinfer_vlm.engine.parallel.wire import (
    BeginEncoding,
    EncodeSlices,
    FinishEncoding,
    Loaded,
    LoadFailed,
    MakeCall,
    Order,
    Start,
    order_decoder,
)
from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.kernels.threads import set_threads
from dashinfer_vlm.layers.ranks import Ranks
from dashinfer_vlm.models.base import EncoderState
from dashinfer_vlm.models.loading import load_model
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.request import Grid

logger = logging.getLogger(__name__)

_LINGER_MS = 2000
_ALL_SLICES = 1 << 30


class Rank:
    """Does what it is told."""

    def __init__(self, model: LoadedModel, calls: ModelCalls) -> None:
        self._model = model
        self._calls = calls
        self._batch: EncoderState | None = None

    @torch.inference_mode()
    def obey(self, order: Order, flat: bytes | None) -> None:
        match order:
            case MakeCall(call):
                assert flat is not None
                self._calls.copy_states(call.copies)
                staged = self._calls.staging.next()
                staged[: call.num_bytes] = np.frombuffer(flat, np.uint8)
                self._calls.send(call)
                self._calls.put_items(call, [])
                self._calls.make(call)
            case BeginEncoding(grids):
                self._batch = self._encoder.begin([self._receive(grid) for grid in grids], grids)
            case EncodeSlices(count):
                self._encoder.run(self._batch, count)
            case FinishEncoding():
                self._finish()

    @property
    def _encoder(self) -> Any:
        assert self._model.encoder is not None, "a text model has nothing to encode"
        return self._model.encoder

    def _receive(self, grid: Grid) -> torch.Tensor:
        assert self._model.config.vision is not None
        shape = math.prod(grid), self._model.config.vision.patch_dim
        patches = torch.empty(shape, dtype=torch.uint8, device=self._model.device)
        self._model.ranks.receive(patches, 0)
        return patches

    def _finish(self) -> None:
        assert self._batch is not None
        while not self._batch.done:
            self._encoder.run(self._batch, _ALL_SLICES)
        for embedding in self._encoder.finish(self._batch):
            self._model.ranks.send(embedding.contiguous(), 0)
        self._batch = None


def serve() -> int:
    """Load this rank's part, then obey until the parent ends it. Returns the exit status."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    exit_with_parent(0)
    logging.basicConfig(level=start.log_level, format=f"%(asctime)s %(levelname)s rank {start.index}: %(message)s")
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(start.address)
    try:
        model = _load(start)
    except Exception as error:
        if not isinstance(error, DashInferError):
            logger.exception("loading failed")
        socket.send(msgspec.msgpack.encode(LoadFailed(Fault.of(error))))
        context.destroy(linger=_LINGER_MS)
        return 1
    socket.send(msgspec.msgpack.encode(Loaded()))
    rank = _join(start, model)
    while True:
        order, *frames = socket.recv_multipart()
        rank.obey(order_decoder.decode(order), frames[0] if frames else None)


def _load(start: Start) -> LoadedModel:
    assert start.config.threads is not None, "the first rank says how many threads there are"
    set_threads(start.config.threads)
    return load_model(start.config, ranks=Ranks(start.index, start.config.parallel_size))


def _join(start: Start, model: LoadedModel) -> Rank:
    """What the first rank does in `load_engine`, in the same order: both measure, and both capture."""
    meet(start.meeting, model.ranks, model.device, start.config)
    _, kv = make_cache(model, start.config)
    calls = ModelCalls(model, kv, start.config, step_shapes(model, start.config))
    if captures_graphs(model):
        calls.capture()
    return Rank(model, calls)


if __name__ == "__main__":
    sys.exit(serve())
