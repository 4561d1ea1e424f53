"""The process that stands for an encoder on another machine: `python -m dashinfer_vlm.encoders.cluster.gateway`.

The engine starts it as it starts a vision worker and speaks to it in the same messages; behind it is a Ray actor. Ray
stays out of the engine's process, since it ends its processes when the cluster's head or the local node is gone. One
gateway is one encoder: when the actor dies, so does the gateway, and the engine's crew starts the next one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cluster.actor import EncoderActor
from dashinfer_vlm.encoders.cluster.identity import weights_identity
from dashinfer_vlm.encoders.cluster.ray_library import RESOURCE, connect
from dashinfer_vlm.encoders.cluster.wire import pack_pictures, unpack_embeddings
from dashinfer_vlm.encoders.elsewhere.wire import Picture, Start
from dashinfer_vlm.encoders.elsewhere.worker import Encode, serve
from dashinfer_vlm.encoders.shared.embedding_bytes import EmbeddingBytes
from dashinfer_vlm.models.config import read_config

logger = logging.getLogger(__name__)

PLACE_CHECK_S = 0.5
PLACE_TIMEOUT_S = 15.0
"""From a free place to a process in it; then the place has gone to somebody else."""
LOST = 70
"""Exit status of a gateway whose actor is gone."""


class Gateway:
    """One actor, from a free place on."""

    def __init__(self, ray: Any, config: EngineConfig, packing: EmbeddingBytes, wait: Callable[[str], None]) -> None:
        self._ray = ray
        self._packing = packing
        self._actor = ray.remote(EncoderActor).options(**_wanted(config)).remote()
        place = self._actor.place.remote()
        if not ray.wait([place], timeout=PLACE_TIMEOUT_S)[0]:
            wait(f"the free {RESOURCE} went to somebody else")
        self.place: str = ray.get(place)
        threading.Thread(target=self._exit_with_actor, name="actor-watch", daemon=True).start()
        there = dataclasses.replace(config, device="auto", cluster=None, vision_cache=None)
        answer: bytes = ray.get(self._actor.load.remote(msgspec.json.encode(there)))
        if answer:
            unpack_embeddings(answer, (), packing)  # raises what the actor says

    def encode(self, pictures: Sequence[Picture], patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One [tokens_i, hidden] per picture; an actor that dies over them ends this process."""
        answer = self._ray.get(self._actor.encode.remote(pack_pictures(pictures, patches, self._packing)))
        return unpack_embeddings(answer, pictures, self._packing)

    def _exit_with_actor(self) -> None:
        try:
            self._ray.get(self._actor.stay.remote())
        except self._ray.exceptions.RayError as error:
            logger.warning("the encoder in %s is gone (%s)", self.place, type(error).__name__)
        os._exit(LOST)


def load(start: Start, wait: Callable[[str], None]) -> Encode:
    """Wait for a free place in the cluster and load the ViT there."""
    config = start.config
    assert config.cluster is not None
    ray = connect(config.cluster)
    columns = read_config(Path(config.model)).embedding_size
    packing = EmbeddingBytes(weights_identity(config), columns, getattr(torch, start.embedding_dtype))
    _wait_for_place(ray, wait)
    gateway = Gateway(ray, config, packing, wait)
    logger.info("an encoder runs in %s", gateway.place)
    return gateway.encode


def _wait_for_place(ray: Any, wait: Callable[[str], None]) -> None:
    has_said = False
    while ray.available_resources().get(RESOURCE, 0) < 1:
        if not has_said:
            wait(f"no machine of the cluster has a free {RESOURCE}")
            has_said = True
        time.sleep(PLACE_CHECK_S)


def _wanted(config: EngineConfig) -> dict[str, Any]:
    return {
        "resources": {RESOURCE: 1},
        "num_cpus": 0,
        "num_gpus": int((config.vision_device or "").startswith("cuda")),
        "max_restarts": 0,  # the engine's crew starts the next one, wherever there is a place then
        "max_concurrency": 2,
    }


def main() -> int:
    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
