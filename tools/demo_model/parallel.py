"""Two single-threaded processes that average their gradients once a step.

On a machine that others use too this loses far less than one process of two threads, which wait for each other
inside every matrix product.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

# glibc hands large blocks back to the system after every tensor; keeping them made training four times as fast
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "200000000",
    "OMP_NUM_THREADS": "1",
}


def keep_memory() -> None:
    """Start this program again under KEPT_MEMORY, which is read only when a process starts."""
    if any(os.environ.get(name) != value for name, value in KEPT_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_MEMORY)


def launch(work: Callable[..., None], num_processes: int, *args: object) -> None:
    """Run `work(rank, num_processes, *args)` in forked processes that find each other through a file."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        given = (work, num_processes, meeting, *args)
        start_processes(join, given, nprocs=num_processes, start_method="fork")  # type: ignore[no-untyped-call]


def join(rank: int, work: Callable[..., None], num_processes: int, meeting: Path, *args: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_processes)
    work(rank, num_processes, *args)
    dist.destroy_process_group()


def average_gradients(parameters: list[nn.Parameter], stop: bool) -> bool:
    """Replaces the gradients by their mean over the processes; true when any of them wants to stop.

    The same parameters must have one in every process.
    """
    learning = [value for value in parameters if value.grad is not None]
    flat = torch.cat([*(value.grad.reshape(-1) for value in learning), torch.tensor([float(stop)])])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for value, mean in zip(learning, torch.split(flat, [*(value.numel() for value in learning), 1]), strict=False):
        value.grad = mean.view_as(value).clone()
    return bool(flat[-1] > 0)
