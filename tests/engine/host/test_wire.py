"""Requests keep everything on their way to another process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq

from dashinfer_vlm.engine.host.child import SocketChannel
from dashinfer_vlm.engine.host.mapping import from_wire, map_tensor
from dashinfer_vlm.engine.host.wire import Refused, WireRequest, command_decoder, event_decoder, to_wire
from dashinfer_vlm.request import Item, Request, SamplingParams
from dashinfer_vlm.shared_array import put


def test_prompts_and_sampling_parameters_survive_the_journey() -> None:
    params = SamplingParams(
        temperature=0.5, logit_bias={3: -2.0}, stop_sequences=((1, 2), (3,)), logprobs=2, seed=2**63
    )
    request = Request(
        id="a", prompt_ids=[1, 2**40], params=params, cache_salt="s", tenant="t", weight=2.0, wants_vector=True
    )
    wire, shared = to_wire(request, Path())
    decoded = command_decoder.decode(msgspec.msgpack.encode(wire))
    assert isinstance(decoded, WireRequest)
    assert from_wire(decoded) == request
    assert not shared


def test_a_mapped_array_holds_no_open_file(tmp_path: Path) -> None:
    """A queue of requests with many pictures each would have none left."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    shared = put(tmp_path, array)
    before = len(os.listdir("/proc/self/fd"))
    mapped = [map_tensor(shared) for _ in range(9)]
    assert len(os.listdir("/proc/self/fd")) == before
    shared.remove()
    assert all(np.array_equal(each.numpy(), array) for each in mapped)


def test_what_was_shared_is_removed_when_the_rest_cannot_be(tmp_path: Path) -> None:
    item = Item(kind="image", start=0, num_tokens=2, content_hash=bytes(32), embedding=torch.ones(2, 4))
    request = Request(id="a", prompt_ids=[1, 2], items=(item,), positions=torch.ones(3, 0))
    with pytest.raises(ValueError, match="empty"):
        to_wire(request, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[tuple[SocketChannel, zmq.Socket[bytes]]]:
    """The child's end, and the parent's."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as parent:
        parent.bind(f"ipc://{tmp_path}/engine")
        channel = SocketChannel(f"ipc://{tmp_path}/engine")
        yield channel, parent
        channel.close()


@pytest.mark.parametrize("num_left", [None, 7])
def test_a_request_whose_arrays_cannot_be_mapped_is_refused_and_the_next_one_is_taken(
    channel: tuple[SocketChannel, zmq.Socket[bytes]], tmp_path: Path, num_left: int | None
) -> None:
    child, parent = channel
    bad = Request(id="bad", prompt_ids=[1, 2], positions=torch.ones(3, 2))
    wire, shared = to_wire(bad, tmp_path)
    if num_left is None:
        shared[0].remove()
    else:
        os.truncate(shared[0].path, num_left)
    good = Request(id="good", prompt_ids=[1])
    for each in (wire, to_wire(good, tmp_path)[0]):
        parent.send(msgspec.msgpack.encode(each))
    commands = child.receive(wait=True)
    while not commands:
        commands = child.receive(wait=True)
    assert commands == [good]
    refused = event_decoder.decode(parent.recv())
    assert isinstance(refused, Refused)
    assert (refused.request_id, refused.fault.kind) == ("bad", "EngineError")
