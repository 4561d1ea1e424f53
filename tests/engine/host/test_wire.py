"""Requests keep everything on their way to another process."""

from __future__ import annotations

from pathlib import Path

import msgspec

from dashinfer_vlm.engine.host.mapping import from_wire
from dashinfer_vlm.engine.host.wire import WireRequest, command_decoder, to_wire
from dashinfer_vlm.request import Request, SamplingParams


def test_prompts_and_sampling_parameters_survive_the_journey() -> None:
    params = SamplingParams(
        temperature=0.5, logit_bias={3: -2.0}, stop_sequences=((1, 2), (3,)), logprobs=2, seed=2**63
    )
    request = Request(id="a", prompt_ids=[1, 2**40], params=params, cache_salt="s", tenant="t", weight=2.0)
    wire, shared = to_wire(request, Path())
    decoded = command_decoder.decode(msgspec.msgpack.encode(wire))
    assert isinstance(decoded, WireRequest)
    assert from_wire(decoded) == request
    assert not shared
