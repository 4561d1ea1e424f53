"""`dashinfer-vlm info`: what a model is and what fits this machine, without loading it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import Console
from rich.table import Table

from dashinfer_vlm.cli.command import CONTEXT
from dashinfer_vlm.cli.options import options
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.hub import DEMO_NAME, resolve

if TYPE_CHECKING:
    from dashinfer_vlm.models.config import CheckpointConfig
    from dashinfer_vlm.models.footprint import Shapes

__all__ = ["info"]

SIZES = ((224, 224), (448, 448), (640, 480), (1280, 720), (1920, 1080), (3840, 2160))
"""Pictures that people send, width x height."""
VISION = {"a8w8": "a8w8", "a16w8": "a16w8", "a16w4": "a16w8", "fp8": "bfloat16"}
"""The ViT's precision beside the text model's: it is not offered with 4 bits, nor in 8-bit floats."""

_GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The shapes of a model's tensors; a text model has none in `vision`."""

    text: Shapes
    vision: Shapes


@click.command("info", context_settings=CONTEXT)
@click.argument("model", default="")
@options(EngineConfig, only=("revision", "hub", "lora", "max_model_len", "min_pixels", "max_pixels"))
def info(model: str, **values: Any) -> None:
    """Say what MODEL is, what it takes, and what of it fits this machine. Only headers of its weights are read.

    dashinfer-vlm info qwen/Qwen2-VL-2B-Instruct
    """
    config = EngineConfig(model=model, **values)
    config.validate()
    config = resolve(config)

    # brings torch
    from dashinfer_vlm.models.config import read_config
    from dashinfer_vlm.models.loading import check_checkpoint
    from dashinfer_vlm.models.weights import Weights

    check_checkpoint(config)
    checkpoint = read_config(Path(config.model))
    weights = Weights.of(checkpoint, config)
    model_parts = Parts(weights.shapes("text"), weights.shapes("vision"))
    console = Console(soft_wrap=True, highlight=False)
    console.print(model or DEMO_NAME, style="bold", markup=False)
    console.print(_facts(checkpoint, model_parts, weights.num_adapted))
    for table in (*_memory(checkpoint, model_parts, config), *_pictures(checkpoint, config)):
        console.print()
        console.print(table)


def _facts(checkpoint: CheckpointConfig, parts: Parts, num_adapted: int) -> Table:
    from dashinfer_vlm.models.footprint import num_parameters

    text, vision = num_parameters(parts.text), num_parameters(parts.vision)
    rows = (
        ("family", checkpoint.architecture),
        ("parameters", f"{_count(text + vision)}: text {_count(text)}, vision {_count(vision)}"),
        *_experts(checkpoint, parts),
        ("stored as", checkpoint.dtype if checkpoint.stored is None else f"{checkpoint.stored}, {checkpoint.dtype}"),
        *([("adapter", f"adds to {num_adapted:,} matrices")] if num_adapted else []),
        ("context", f"{checkpoint.text.max_position_embeddings:,} tokens"),
        *([("vectors", f"of {checkpoint.text.hidden_size:,} numbers")] if checkpoint.text.embeds else []),
        *([("scores", "of pairs of a query and a document")] if checkpoint.text.scoring else []),
        *([("states", f"{_size(checkpoint.text.state_bytes)} a request")] if checkpoint.text.state_bytes else []),
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _experts(checkpoint: CheckpointConfig, parts: Parts) -> Iterator[tuple[str, str]]:
    """One fact; none for a model without experts."""
    from dashinfer_vlm.models.footprint import experts_of, num_parameters

    if (mixture := checkpoint.text.mixture) is None:
        return
    experts = num_parameters(experts_of(parts.text))
    used = num_parameters(parts.text) - experts + experts * mixture.num_chosen // mixture.num_experts
    taken = f"{mixture.num_chosen} and a shared one" if mixture.has_shared else f"{mixture.num_chosen}"
    yield "experts", f"{mixture.num_experts}, of which a token takes {taken}: {_count(used)} parameters"


def _memory(checkpoint: CheckpointConfig, parts: Parts, config: EngineConfig) -> Iterator[Table]:
    """A table for the processor, and one for each card."""
    import torch

    from dashinfer_vlm.engine.memory import free_bytes
    from dashinfer_vlm.models.footprint import CARD_PRECISIONS, PRECISIONS

    places = [(torch.device("cpu"), f"{len(os.sched_getaffinity(0))} cores", PRECISIONS)]
    for i in range(torch.cuda.device_count()):
        places.append((torch.device("cuda", i), torch.cuda.get_device_name(i), CARD_PRECISIONS))
    for device, name, precisions in places:
        free = free_bytes(device)
        table = _weights(checkpoint, parts, config, precisions, free)
        table.title = f"{device}, {name}: {_size(free)} are free"
        yield table


def _weights(
    checkpoint: CheckpointConfig, parts: Parts, config: EngineConfig, precisions: Sequence[str], free: int
) -> Table:
    """A row per precision: its weights, and how many requests' KV cache fits beside them."""
    import torch

    from dashinfer_vlm.models.footprint import kv_token_bytes, weight_bytes
    from dashinfer_vlm.models.settings import resolve_max_model_len

    length = resolve_max_model_len(checkpoint.text.max_position_embeddings, config)
    table = Table(title_justify="left", box=None, padding=(0, 2, 0, 0))
    for title in ("precision", "text", "vision", "a token of KV", "fits", f"requests of {length:,} tokens"):
        table.add_column(title, justify="left" if title == "precision" else "right")
    for precision in precisions:
        text = weight_bytes(parts.text, precision)
        vision = weight_bytes(parts.vision, VISION.get(precision, precision))
        token = kv_token_bytes(checkpoint.text, torch.float32 if precision == "float32" else torch.bfloat16)
        room = free - text - vision
        requests = max(room, 0) // (token * length + checkpoint.text.state_bytes)
        table.add_row(precision, _size(text), _size(vision), _size(token), "yes" if room > 0 else "no", f"{requests:,}")
    return table


def _pictures(checkpoint: CheckpointConfig, config: EngineConfig) -> Iterator[Table]:
    """One table; none for a text model."""
    from dashinfer_vlm.processors.qwen import image_grid, image_size, num_tokens

    if checkpoint.processor is None:
        return
    processor = checkpoint.processor.with_server_bounds(config.min_pixels, config.max_pixels)
    table = Table(title="Pictures", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for title in ("size", "as the model sees it", "tokens"):
        table.add_column(title, justify="right")
    for width, height in SIZES:
        seen_width, seen_height = image_size(width, height, processor)
        tokens = num_tokens(image_grid(width, height, processor), processor.merge_size)
        table.add_row(f"{width} x {height}", f"{seen_width} x {seen_height}", f"{tokens:,}")
    yield table


def _count(number: int) -> str:
    """3.1 million, 2.2 billion."""
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", _GIB), ("MiB", 2**20)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1024:,.1f} KiB"
