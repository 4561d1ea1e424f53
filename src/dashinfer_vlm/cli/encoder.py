"""`dashinfer-vlm encoder`: lend this machine to a cluster, for the vision encoders of a server elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import rich_click as click

from dashinfer_vlm.child_process import running
from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cluster.ray_library import RESOURCE, check_head, ray_library
from dashinfer_vlm.errors import DashInferError
from dashinfer_vlm.hub import resolve_lora, resolve_model

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["encoder"]

OBJECT_STORE_BYTES = 1 << 30
"""What travels through Ray is patches and embeddings of a few batches; Ray itself would take 30 % of the memory."""
MAX_FAILURES = 3
"""Nodes that did not last in a row; Ray gives one 30 s to start, which a busy machine may not keep."""
JOINED_S = 120.0
"""A node that lasted longer had joined."""


@click.command("encoder", context_settings=CONTEXT)
@click.option("--join", "address", required=True, metavar="HOST:PORT", help="Head of the Ray cluster.")
@click.option("--model", help="Folder or id of the model on this machine; the server's own folder when absent.")
@click.option("--lora", help="Folder or id of the server's adapter on this machine; likewise.")
@click.option("--encoders", type=click.IntRange(1), default=1, show_default=True, help="Encoders that fit here.")
@click.option("--threads", type=click.IntRange(1), help="Compute threads of each; they share the cores when absent.")
def encoder(address: str, model: str | None, lora: str | None, encoders: int, threads: int | None) -> None:
    """Lend this machine to a server's vision encoder, until Ctrl-C.

    dashinfer-vlm encoder --join 192.168.0.10:6379
    """
    ray_library()
    check_head(address)
    environment = dict(os.environ)
    if model is not None:
        environment["DASHINFER_ENCODER_MODEL"] = str(resolve_model(EngineConfig(model=model)).resolve())
    if lora is not None:
        environment["DASHINFER_ENCODER_LORA"] = str(resolve_lora(lora).resolve())
    environment["DASHINFER_ENCODER_THREADS"] = str(threads or max(1, len(os.sched_getaffinity(0)) // encoders))
    click.echo(f"joining {address} with room for {encoders} vision encoders; Ctrl-C takes this machine back", err=True)
    _lend(node_command(address, encoders), environment)


def node_command(address: str, num_encoders: int) -> list[str]:
    """What starts a Ray node that offers room for that many encoders, and nothing else."""
    resources = json.dumps({RESOURCE: num_encoders})
    start = [*running("ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=0")]
    return [*start, f"--object-store-memory={OBJECT_STORE_BYTES}", f"--resources={resources}", f"--address={address}"]


def _lend(command: Sequence[str], environment: dict[str, str]) -> None:
    """Stay in the cluster until Ctrl-C, also when its head is away for a while. Raises DashInferError when joining
    fails again and again."""
    num_failures = 0
    while num_failures < MAX_FAILURES:
        start = time.monotonic()
        status = _run(command, environment)
        if not status:
            return
        num_failures = 0 if time.monotonic() - start > JOINED_S else num_failures + 1
        click.echo(f"the Ray node ended with status {status}", err=True)
    raise DashInferError(f"{command[-1]}: the cluster could not be joined in {MAX_FAILURES} tries; is its head there?")


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run until it ends by itself, or until this process is told to end: then 0."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    node = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return node.wait()
    except KeyboardInterrupt:
        node.terminate()
        node.wait()
        return 0
