"""`dashinfer-vlm quantize`: what the first start with quantised weights does, done ahead."""

from __future__ import annotations

from typing import Any

import rich_click as click

from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.cli.logs import set_up_logging
from dashinfer_vlm.cli.options import options
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.hub import resolve
from dashinfer_vlm.progress import LoadingProgress

__all__ = ["quantize"]

FIELDS = (
    "revision",
    "hub",
    "lora",
    "dtype",
    "quant_type",
    "quant_cache",
    "quant_cache_gib",
    "threads",
    "vision_quant_type",
)


@click.command("quantize", context_settings=CONTEXT)
@click.argument("model", default="")
@options(EngineConfig, only=FIELDS)
def quantize(model: str, **values: Any) -> None:
    """Quantise the weights of MODEL and keep them, so that servers with the same flags find them and start sooner.

    dashinfer-vlm quantize qwen/Qwen2-VL-2B-Instruct --quant-type a8w8
    """
    config = EngineConfig(model=model, device="cpu", **values)
    config.validate()
    if config.quant_type == config.vision_quant_type == "none":
        raise ConfigError("nothing to quantise: name --quant-type, --vision-quant-type, or both")
    if config.quant_type == "fp8":
        raise ConfigError(
            "--quant-type fp8 is made on the card in seconds; there is nothing to keep for the next start"
        )
    if not config.quant_cache_gib:
        raise ConfigError("--quant-cache-gib 0 keeps nothing; give it room")
    set_up_logging("warning")
    config = resolve(config)

    # brings torch
    from dashinfer_vlm.kernels.threads import set_threads
    from dashinfer_vlm.models.loading import quantise

    if config.threads is not None:
        set_threads(config.threads)
    with LoadingProgress() as progress:
        kept = quantise(
            config,
            progress=lambda done, total: progress("weights", done, total),
        )
    for path in kept:
        click.echo(f"{path.stat().st_size / 2**20:,.1f} MiB in {path}")
