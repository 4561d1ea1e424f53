"""From a configuration to an engine that is ready for its first request."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.engine.cards.worst_step import CardMeter, worst_step_bytes
from dashinfer_vlm.engine.client import OnProgress
from dashinfer_vlm.engine.devices import max_batched_tokens, num_spare_blocks
from dashinfer_vlm.engine.engine import Engine
from dashinfer_vlm.engine.grammars.compiler import Compiler, read_vocabulary
from dashinfer_vlm.engine.info import EngineInfo
from dashinfer_vlm.engine.memory import kv_block_bytes, kv_dtype, num_kv_blocks, num_seats
from dashinfer_vlm.engine.parallel.crew import RankProcesses
from dashinfer_vlm.engine.parallel.encoder import DealtEncoder
from dashinfer_vlm.engine.parallel.meeting import meet
from dashinfer_vlm.kernels.threads import engine_cores, engine_threads, set_threads, stay_on
from dashinfer_vlm.layers.memory import huge_pages
from dashinfer_vlm.layers.ranks import Ranks
from dashinfer_vlm.models.base import KVCache
from dashinfer_vlm.models.loading import allocate_kv, device_of, load_model
from dashinfer_vlm.models.model import LoadedModel
from dashinfer_vlm.models.weights import Progress

__all__ = ["load_engine", "make_cache"]

logger = logging.getLogger(__name__)


def load_engine(
    config: EngineConfig, progress: OnProgress, *, max_waiting_grammars: float = math.inf
) -> tuple[Engine, EngineInfo]:
    """Load the checkpoint in the folder `config.model`; "weights" is the one stage of progress, in bytes. The engine
    refuses a grammar while `max_waiting_grammars` others are to be compiled.

    Raises CheckpointError for a folder that cannot be used, ConfigError for a device, a length or a cache that cannot
    be had. The number of threads holds for the whole process.
    """
    config.validate()
    start = time.perf_counter()
    num_threads, cores = engine_threads(config), engine_cores(config)
    set_threads(num_threads, cores)
    device_of(config, Ranks(0, config.parallel_size))  # before processes are started that would not find theirs
    processes = None if config.parallel_size == 1 else RankProcesses(config)
    try:
        model, num_blocks, engine = _load(
            config, processes, lambda done, total: progress("weights", done, total), max_waiting_grammars
        )
    except BaseException:
        if processes is not None:
            processes.close()
        raise
    info = _info(engine, engine.runner.kv)
    logger.info(
        "loaded %s on %s as %s in %.1f s; %s KV cache: %d blocks of %d tokens, %d tokens in %.2f GiB",
        config.model,
        model.device,
        info.precision,
        time.perf_counter() - start,
        info.kv_dtype,
        num_blocks,
        config.block_size,
        num_blocks * config.block_size,
        num_blocks * kv_block_bytes(model, config) / 2**30,
    )
    stored = model.config.stored
    kept = None if stored is None else stored.quant_type(model.device.type)
    if kept is not None and config.quant_type == "none":
        logger.info("weights are stored in %s, and were expanded; --quant-type %s takes them as they are", stored, kept)
    if info.num_states:
        size = info.num_states * info.state_bytes / 2**30
        logger.info("%d states, of sequences and saved ones, in %.2f GiB", info.num_states, size)
    if model.device.type == "cpu":
        pinned = "not pinned" if cores is None else f"pinned to cores {', '.join(map(str, cores))}"
        logger.info(
            "%d compute threads, %s, torch's own %d; %s", num_threads, pinned, torch.get_num_threads(), huge_pages()
        )
    stay_on(cores)
    return engine, info


def _load(
    config: EngineConfig, processes: RankProcesses | None, progress: Progress, max_waiting_grammars: float
) -> tuple[LoadedModel, int, Engine]:
    """Model, blocks of its cache, engine."""
    model = load_model(config, progress=progress, ranks=Ranks(0, config.parallel_size))
    if processes is not None:
        processes.wait_loaded()
        meet(processes.meeting, model.ranks, model.device, config)
    num_blocks, kv = make_cache(model, config)
    if processes is not None and model.encoder is not None:
        model.encoder = DealtEncoder(model, processes)
    grammars = Compiler(
        partial(read_vocabulary, Path(config.model)),
        model.text.vocab_size,
        model.eos_token_ids,
        max_waiting=max_waiting_grammars,
    )
    return model, num_blocks, Engine(model, kv, config, grammars, processes)


def make_cache(model: LoadedModel, config: EngineConfig) -> tuple[int, KVCache]:
    """The KV cache, and its blocks without those that no sequence gets: as many, and as many seats, as every rank of
    the model has room for."""
    reserved, spare = _reserved_bytes(model, config), num_spare_blocks(model.device, model.ranks.count)
    num_blocks = model.ranks.least(num_kv_blocks(model, config, reserved), model.device)
    dtype, seats = kv_dtype(model, config), model.ranks.least(num_seats(model, config, reserved), model.device)
    return num_blocks, allocate_kv(model, num_blocks + spare, config.block_size, dtype, num_seats=seats)


def _reserved_bytes(model: LoadedModel, config: EngineConfig) -> int | None:
    """What steps need of a card beside the KV cache; a processor's share is a guess."""
    if model.device.type != "cuda":
        return None
    meter = CardMeter(model.device)
    return worst_step_bytes(model, model.config.vision, config, max_batched_tokens(config, model.device), meter)


def _info(engine: Engine, kv: KVCache) -> EngineInfo:
    return EngineInfo(
        model=engine.config.model,
        max_model_len=engine.limits.max_model_len,
        vocab_size=engine.limits.vocab_size,
        hidden_size=engine.limits.hidden_size,
        embedding_size=engine.limits.embedding_size,
        eos_token_ids=engine.model.eos_token_ids,
        device=str(engine.model.device),
        dtype=_name(engine.model.kv_dtype),
        kv_dtype=_name(kv.keys[0].dtype),
        block_size=kv.block_size,
        num_blocks=kv.num_blocks,
        max_num_seqs=engine.scheduler.max_num_seqs,
        max_item_patches=engine.limits.max_item_patches,
        lora=engine.config.lora or None,
        quant_type=engine.config.quant_type,
        vision_quant_type=engine.config.vision_quant_type,
        state_bytes=engine.model.text.state_bytes,
        num_states=kv.num_seats or 0,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
