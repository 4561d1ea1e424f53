"""What a process has loaded works in that process alone: a child that is forked from it has the objects and none of
their threads, for which it would wait forever."""

from __future__ import annotations

import os

from dashinfer_vlm.errors import EngineDeadError

__all__ = ["check_process"]


def check_process(pid: int) -> None:
    """Raise EngineDeadError in any process but `pid`, which has the threads."""
    if os.getpid() != pid:
        raise EngineDeadError(
            f"process {pid} has loaded the model, and this one was forked from it without its threads; load the model "
            "here, or ask the other process"
        )
