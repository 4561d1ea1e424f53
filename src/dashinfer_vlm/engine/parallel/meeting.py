"""How the processes of one model find each other, on one machine."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.layers.ranks import Ranks

__all__ = ["leave", "meet"]


def meet(path: str, ranks: Ranks, device: torch.device, config: EngineConfig) -> None:
    """Wait for all ranks at the file `path`; from then on they are torch's default group. One that hears nothing of the
    others within a step for `step_timeout_s` fails."""
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{path}",
        rank=ranks.index,
        world_size=ranks.count,
        timeout=timedelta(seconds=config.step_timeout_s),
    )


def leave() -> None:
    """Idempotent. NCCL's group ends with the process: it waits until all ranks leave together, which one that has died
    does not, and until no graph knows it any more."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
