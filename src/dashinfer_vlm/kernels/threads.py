"""Compute threads: how many each of our processes on this machine has, on which cores, and what memory they read."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.cores import claim, memory_nodes, parse_list, usable_cores
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops

__all__ = [
    "engine_cores",
    "engine_threads",
    "in_torch_threads",
    "leave_torch_one_thread",
    "set_threads",
    "stay_on",
    "vision_threads",
    "worker_cores",
]

logger = logging.getLogger(__name__)


def vision_threads(config: EngineConfig) -> int:
    """Compute threads of one worker: the engine and the workers share the cores evenly unless told otherwise."""
    return config.vision_threads or max(1, len(_cores(config)) // (config.vision_workers + 1))


def engine_threads(config: EngineConfig) -> int:
    """Compute threads of the engine: one per core, without those that workers on this machine's cores take; the ranks
    of a model that is shared have equal parts."""
    taken = config.vision_workers * vision_threads(config) if _workers_compute_here(config) else 0
    return config.threads or max(1, (len(_cores(config)) - taken) // config.parallel_size)


def engine_cores(config: EngineConfig) -> list[int] | None:
    """The cores that the engine's threads are pinned to, one each; None: they are not pinned.

    Raises ConfigError when there are fewer cores than threads.
    """
    return _share(config, 0, engine_threads(config))


def worker_cores(config: EngineConfig, number: int) -> list[int] | None:
    """The same for vision worker `number`, counted from 0; no core is in two shares."""
    if not _workers_compute_here(config):
        return None
    each = vision_threads(config)
    return _share(config, engine_threads(config) + number * each, each)


def set_threads(num_threads: int, cores: Sequence[int] | None = None) -> None:
    """Compute threads of this process, torch's and the native kernels', pinned to `cores` if there are any; weights
    that are loaded from now on are spread over the memory nodes of those cores.

    The calling thread computes too: `stay_on` is its part. Raises ConfigError when a core belongs to another process.
    """
    torch.set_num_threads(num_threads)
    if cores is not None:
        claim(cores)
    if not cpu_ops.available():
        return
    cpu_ops.set_num_threads(num_threads)
    cpu_ops.set_cores(cores or ())
    nodes = memory_nodes(cores or usable_cores())
    if len(nodes) < 2:  # memory of the only node is near to every thread
        return
    try:
        cpu_ops.set_memory_nodes(nodes)
    except OSError as error:
        logger.warning("weights cannot be spread over memory nodes %s: %s", nodes, error)


def stay_on(cores: Sequence[int] | None) -> None:
    """Let the calling thread, and all that it starts, run on any of `cores` but on no other; None changes nothing.

    For the end of loading: vision workers that were started before, and the threads that start them again, have cores
    of their own.
    """
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def leave_torch_one_thread() -> None:
    """For a process whose native kernels do all that is heavy: torch's threads would wait actively at the end of every
    small operation, on the cores that the kernels want."""
    torch.set_num_threads(1)


def in_torch_threads(work: Callable[[int], object], items: Iterable[int]) -> None:
    """`work` on every item, in as many threads as torch has, each of which computes alone: together they would wait for
    each other at the end of every small operation."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            deque(pool.map(work, items), maxlen=0)
    finally:
        torch.set_num_threads(count)


def _share(config: EngineConfig, first: int, count: int) -> list[int] | None:
    if config.cores is None:
        return None
    cores, last = _cores(config), first + count
    if last > len(cores):
        raise ConfigError(
            f"--cores {config.cores} means {len(cores)} cores, too few for {last} compute threads; give more cores, or "
            "less with --threads and --vision-threads"
        )
    return cores[first:last]


def _cores(config: EngineConfig) -> list[int]:
    return usable_cores() if config.cores in (None, "auto") else parse_list(config.cores)


def _workers_compute_here(config: EngineConfig) -> bool:
    elsewhere = config.cluster is not None or (config.vision_device or config.device).startswith("cuda")
    return bool(config.vision_workers) and not elsewhere
