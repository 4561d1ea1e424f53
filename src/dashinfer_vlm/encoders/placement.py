"""Where the vision encoder runs: chosen once, from the configuration."""

from __future__ import annotations

import dataclasses
import logging

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cache import EmbeddingCache
from dashinfer_vlm.encoders.elsewhere.crew import Crew
from dashinfer_vlm.encoders.elsewhere.process import START_TIMEOUT_S, ProcessEncoder
from dashinfer_vlm.encoders.elsewhere.stage import WorkerEncoder
from dashinfer_vlm.encoders.in_step import InStepEncoder
from dashinfer_vlm.encoders.queue import ItemQueue
from dashinfer_vlm.encoders.stage import EncoderStage, NoEncoder
from dashinfer_vlm.kernels.threads import vision_threads, worker_cores
from dashinfer_vlm.models.base import Model
from dashinfer_vlm.shared_array import SharedFolder

logger = logging.getLogger(__name__)

GATEWAY = "dashinfer_vlm.encoders.cluster.gateway"
"""The process that stands for an encoder on another machine."""


def batch_patches(device: str, config: EngineConfig) -> int:
    """Patches of the items that are encoded together. A CPU is busy with one image; a card needs several small ones at
    once, and multiplies more of them a little faster still, but hands out the first when the last is done."""
    if device == "cpu":
        return 1024
    return 65536 if config.schedule == "throughput" else 16384


def make_stage(model: Model, config: EngineConfig) -> EncoderStage:
    """The encoder stage that `config` asks for, its workers started; for a text model, one that encodes nothing.

    Raises ConfigError for a device that a worker does not find; workers that do not start for another reason are tried
    again later, while the engine encodes in its own step.
    """
    if model.encoder is None:
        return NoEncoder()
    queue = ItemQueue(EmbeddingCache(int(config.vision_cache_gib * 2**30)))
    most = batch_patches(model.device.type, config)
    own = InStepEncoder(model.encoder, queue, model.device, most * model.ranks.count)
    if not config.vision_workers:
        return own
    crew = _crew(model, config)
    crew.wait_started(START_TIMEOUT_S)
    logger.info("%d of %d vision workers are ready", crew.num_ready, config.vision_workers)
    device = (config.vision_device or model.device.type).partition(":")[0]
    return WorkerEncoder(queue, crew, own, batch_patches(device, config))


def _crew(model: Model, config: EngineConfig) -> Crew:
    folder, dtype = SharedFolder(), model.activation_dtype
    if config.cluster is None:
        encoders = [
            ProcessEncoder(config_of_worker(config, number), folder, dtype) for number in range(config.vision_workers)
        ]
    else:
        told = dataclasses.replace(config, cores=None)  # those of this machine
        encoders = [ProcessEncoder(told, folder, dtype, GATEWAY) for _ in range(config.vision_workers)]
    return Crew(encoders, on_close=folder.close)


def config_of_worker(config: EngineConfig, number: int) -> EngineConfig:
    """The configuration of worker `number`, with threads and cores of its own."""
    cores = worker_cores(config, number)
    listed = None if cores is None else ",".join(map(str, cores))
    return dataclasses.replace(config, threads=vision_threads(config), cores=listed)
