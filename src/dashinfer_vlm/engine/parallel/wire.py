"""What the first rank tells the others, and what they say when they have loaded. Tensors travel between the ranks by
torch's collectives, staged bytes in a frame behind their message.
"""

from __future__ import annotations

import msgspec

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.cards.calls import Call
from dashinfer_vlm.fault import Fault
from dashinfer_vlm.request import Grid


class Start(msgspec.Struct, frozen=True):
    """The first line of a new rank's standard input, as JSON."""

    address: str
    """ZeroMQ endpoint of the first rank."""
    config: EngineConfig
    """With the threads of this rank."""
    index: int
    meeting: str
    """File through which the ranks find each other."""
    log_level: int


class Loaded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """This rank's part of the model is where it belongs."""


class LoadFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The process ends after this."""

    fault: Fault


class MakeCall(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A model call over the bytes in the next frame."""

    call: Call


class BeginEncoding(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A batch for this rank's encoder; the patches are sent one by one."""

    grids: list[Grid]


class EncodeSlices(msgspec.Struct, frozen=True, tag=True, array_like=True):
    count: int


class FinishEncoding(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Do what is left and send the embeddings one by one."""


Order = MakeCall | BeginEncoding | EncodeSlices | FinishEncoding
News = Loaded | LoadFailed

order_decoder = msgspec.msgpack.Decoder(Order)
news_decoder = msgspec.msgpack.Decoder(News)
