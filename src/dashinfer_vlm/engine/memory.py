"""How much memory there is, and how many KV blocks fit into what is left of it after the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from dashinfer_vlm.cgroups import free_memory
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.layers.attention import cache_row_size
from dashinfer_vlm.models.base import KVCache, Model, embedding_row_bytes
from dashinfer_vlm.models.settings import resolve_max_model_len

_GIB = 2**30
CPU_DEFAULT_GIB = 2.0
"""A laptop has other things to do; --kv-cache-gib gives more. Pages are resident only once they are used."""
_CPU_SHARE = 0.5

MIN_ITEM_PATCHES = 1024
"""A picture of 448 x 448."""
_ENCODER_SHARE = 0.8
SAVED_PER_SEQUENCE = 3
"""States that are saved beside one that runs, such as behind its last prompt, its last answer, and where its prompt
parts from others."""
EMBEDDING_HEADROOM_BYTES = 256 << 20
"""What running sequences may hold beyond the cache's budget, so that a cache of 0 does not mean one at a time."""


def num_kv_blocks(model: Model, config: EngineConfig, reserved: int | None = None) -> int:
    """Blocks of the KV cache: as configured, else a share of the free memory, without what `num_seats` take of it;
    never more than every sequence could fill. Raises ConfigError when what was asked for is more than the machine has.

    With `reserved` bytes for steps, as on a card, the cache takes all that those and the kept embeddings leave."""
    seats = num_seats(model, config, reserved)
    left = _cache_bytes(model, config, reserved) - seats * model.text.state_bytes
    max_len = resolve_max_model_len(model.text.max_position_embeddings, config)
    useful = min(seats // seats_to_run(config), config.max_num_seqs) * -(-max_len // config.block_size)
    return max(1, min(int(left // kv_block_bytes(model, config)), useful))


def num_seats(model: Model, config: EngineConfig, reserved: int | None = None) -> int:
    """States that can be kept, of sequences that run and saved ones; without states, of sequences that run. As many as
    have room in half of the cache's memory, but one; no more than are of use. `reserved` as in `num_kv_blocks`."""
    if not model.text.state_bytes:
        return config.max_num_seqs
    fit = int(_cache_bytes(model, config, reserved) / 2 // model.text.state_bytes)
    running = seats_to_run(config)
    return max(running, min(fit, config.max_num_seqs * (running + (SAVED_PER_SEQUENCE if config.prefix_cache else 0))))


def seats_to_run(config: EngineConfig) -> int:
    """Seats that a running sequence takes: while it has guesses computed, its state waits in a second one."""
    return 1 if config.speculative_config is None else 2


def most_running(kv: KVCache, config: EngineConfig) -> int:
    """Sequences that run at once: as configured, or as many as have seats for their states."""
    if kv.num_seats is None:
        return config.max_num_seqs
    return min(config.max_num_seqs, kv.num_seats // seats_to_run(config))


def _cache_bytes(model: Model, config: EngineConfig, reserved: int | None = None) -> float:
    free = free_bytes(model.device)
    if config.kv_cache_gib is None:
        if reserved is None:
            wanted = min(CPU_DEFAULT_GIB * _GIB, _CPU_SHARE * free)
        else:
            wanted = free - reserved - _embedding_bytes(config)
    else:
        wanted = config.kv_cache_gib * _GIB
        if wanted > free:
            raise ConfigError(f"--kv-cache-gib is {config.kv_cache_gib:g}, but {free / _GIB:.1f} GiB are free")
    return wanted


def max_item_patches(model: Model, kv: KVCache) -> int:
    """Patches of one image or video that the encoder has memory for, beside the KV cache.

    The memory is looked at now; small pictures are always tried. 0 for a model without an encoder.
    """
    if model.encoder is None:
        return 0
    free = free_bytes(model.device)
    if model.device.type == "cpu":  # its pages come when they are first written
        free -= kv.num_bytes
    return max(MIN_ITEM_PATCHES, int(_ENCODER_SHARE * free / model.encoder.bytes_per_patch))


def max_pinned_tokens(model: Model, config: EngineConfig) -> int:
    """Visual tokens whose embeddings running sequences may hold: what the cache may hold, and some more."""
    return _embedding_bytes(config) // embedding_row_bytes(model)


def _embedding_bytes(config: EngineConfig) -> int:
    return int(config.vision_cache_gib * _GIB) + EMBEDDING_HEADROOM_BYTES


def kv_dtype(model: Model, config: EngineConfig) -> torch.dtype:
    """What keys and values are stored as."""
    return torch.int8 if config.kv_cache_dtype == "int8" else model.kv_dtype


def kv_block_bytes(model: Model, config: EngineConfig) -> int:
    """Bytes of one block over all layers, keys and values."""
    text, dtype = model.text, kv_dtype(model, config)
    row_bytes = cache_row_size(text.head_dim, dtype, model.device.type) * dtype.itemsize
    return 2 * text.num_kv_layers * config.block_size * text.num_kv_heads * row_bytes


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`; on the CPU the smaller of what the machine and the container have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8 * _GIB  # no Linux: no cheap way to ask; the default cache is below this anyway
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    of_the_machine, of_the_container = int(available.split()[1]) * 1024, free_memory()
    return of_the_machine if of_the_container is None else min(of_the_machine, of_the_container)
