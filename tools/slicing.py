"""What it costs to encode in slices: `python tools/slicing.py --model FOLDER` encodes the same pictures whole and in
slices, in turns, with no text beside them. Only the vision encoder is loaded. Ends with a table and, as the last line,
one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import rich_click as click
import torch
from rich.console import Console
from rich.table import Table

from dashinfer_vlm import __version__, flags
from dashinfer_vlm.bench.config import parse_size
from dashinfer_vlm.bench.figures import Spread
from dashinfer_vlm.bench.machine import Machine
from dashinfer_vlm.bench.workloads import Size
from dashinfer_vlm.cli.command import CONTEXT, execute
from dashinfer_vlm.cli.options import options
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.hub import resolve
from dashinfer_vlm.kernels.threads import engine_cores, engine_threads, set_threads
from dashinfer_vlm.models.loading import load_encoder
from dashinfer_vlm.models.vit import PackedVit
from dashinfer_vlm.request import Grid

WHOLE = float("inf")


@click.command(context_settings=CONTEXT)
@click.option(
    "--image-size",
    "image_sizes",
    multiple=True,
    metavar="PX|WxH",
    default=("448", "896"),
    show_default=True,
    help="Size of the pictures, multiples of 28. Repeatable.",
)
@click.option("--repeats", default=5, show_default=True, metavar="COUNT", help="Pairs of each size, after a first one.")
@options(EngineConfig)
def slicing(image_sizes: tuple[str, ...], repeats: int, **values: Any) -> None:
    """Measure what it costs to encode pictures in slices: the same pictures whole and in slices, in turns."""
    engine = flags.build(EngineConfig, values)
    engine.validate()
    config = SlicingBench(
        engine=resolve(engine),
        image_sizes=tuple(parse_size(text) for text in image_sizes),
        repeats=repeats,
    )
    with Console(stderr=True).status("loading the vision encoder") as status:
        figures = measure_slicing(config, lambda size: status.update(f"encoding {size}"))
    Console(width=None if sys.stdout.isatty() else 170).print(slicing_table(figures))
    print(json.dumps(slicing_json(config, Machine.here(), figures)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicingBench:
    """Sizes of the work."""

    engine: EngineConfig
    """`model` is a folder; only its ViT is loaded."""
    image_sizes: tuple[Size, ...] = ((448, 448), (896, 896))
    """Width and height in pixels."""
    repeats: int = 5
    """Pairs of each size, after a first one."""
    seed: int = 0

    def validate(self) -> None:
        """Raise ConfigError for the first value that cannot be measured with."""
        self.engine.validate()
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}; it must be at least 1")
        if self.engine.vision_engine != "native":
            raise ConfigError(f"--vision-engine {self.engine.vision_engine} has no slices; measure native")


@dataclass(frozen=True, slots=True)
class SlicingFigures:
    """Of pictures of one size; times in seconds of one picture."""

    image_size: Size
    num_tokens: int
    num_slices: int
    whole_s: Spread
    sliced_s: Spread
    longest_slice_s: float
    """Median over the pictures: what a stream may have to wait for."""
    loss: Spread
    """Share of the throughput that slicing costs, pair by pair; below 0 it gains."""


def measure_slicing(config: SlicingBench, progress: Callable[[str], None] = lambda what: None) -> list[SlicingFigures]:
    """A result for each size. `progress` hears of every pair that is done.

    Raises ConfigError and CheckpointError as loading does.
    """
    config.validate()
    set_threads(engine_threads(config.engine), engine_cores(config.engine))
    encoder = load_encoder(config.engine)
    assert isinstance(encoder, PackedVit)
    return [_of_size(encoder, size, config, progress) for size in config.image_sizes]


def slicing_table(figures: list[SlicingFigures]) -> Table:
    """One row per size."""
    shown = Table(caption="median (least to most)", caption_justify="left")
    for head in ("picture", "tokens", "whole, s", "in slices, s", "slices", "longest slice, ms", "loss"):
        shown.add_column(head, justify="right")
    for one in figures:
        shown.add_row(
            f"{one.image_size[0]}x{one.image_size[1]}",
            str(one.num_tokens),
            _spread(one.whole_s, "{:.2f}"),
            _spread(one.sliced_s, "{:.2f}"),
            str(one.num_slices),
            f"{1000 * one.longest_slice_s:.1f}",
            _spread(one.loss, "{:.1%}"),
        )
    return shown


def slicing_json(config: SlicingBench, machine: Machine, figures: list[SlicingFigures]) -> dict[str, Any]:
    """Times in seconds."""
    return {
        "bench": "slicing",
        "version": __version__,
        "machine": asdict(machine),
        "settings": {**asdict(config), "engine": asdict(config.engine)},
        "results": [asdict(one) for one in figures],
    }


def _of_size(encoder: PackedVit, size: Size, config: SlicingBench, progress: Callable[[str], None]) -> SlicingFigures:
    unit = encoder.config.patch_size * encoder.config.merge_size
    if any(n < unit or n % unit for n in size):
        raise ConfigError(f"--image-size is {size[0]}x{size[1]}; both sides must be multiples of {unit} pixels")
    grid = (1, size[1] // encoder.config.patch_size, size[0] // encoder.config.patch_size)
    pictures = _pictures(math.prod(grid), encoder.config.patch_dim, config)
    slice_flops = encoder.slice_flops
    whole_s, sliced = [], []
    for number, picture in enumerate(pictures):
        order = (WHOLE, slice_flops) if number % 2 else (slice_flops, WHOLE)
        taken = {flops: _encode(encoder, picture, grid, flops) for flops in order}
        progress(f"{size[0]}x{size[1]}")
        if number:  # the first pair warmed up
            whole_s.append(sum(taken[WHOLE]))
            sliced.append(taken[slice_flops])
    encoder.slice_flops = slice_flops
    sliced_s = [sum(slices) for slices in sliced]
    return SlicingFigures(
        image_size=size,
        num_tokens=math.prod(grid) // encoder.config.merge_size**2,
        num_slices=len(sliced[0]),
        whole_s=Spread.of(whole_s),
        sliced_s=Spread.of(sliced_s),
        longest_slice_s=median(max(slices) for slices in sliced),
        loss=Spread.of([1 - whole / slices for whole, slices in zip(whole_s, sliced_s, strict=True)]),
    )


def _pictures(num_patches: int, patch_dim: int, config: SlicingBench) -> Iterator[torch.Tensor]:
    rng = np.random.default_rng((config.seed, num_patches))
    for _ in range(1 + config.repeats):
        yield torch.from_numpy(rng.integers(0, 256, (num_patches, patch_dim), dtype=np.uint8))


def _encode(encoder: PackedVit, patches: torch.Tensor, grid: Grid, slice_flops: float) -> list[float]:
    """Seconds of each slice; the first one has the packing in it, the last one the merging."""
    encoder.slice_flops = slice_flops
    marks = [time.perf_counter()]
    with torch.inference_mode():
        state = encoder.begin([patches], [grid])
        while not state.done:
            encoder.run(state, 1)
            _wait(encoder)
            marks.append(time.perf_counter())
        encoder.finish(state)
        _wait(encoder)
    marks[-1] = time.perf_counter()
    return [after - before for before, after in pairwise(marks)]


def _wait(encoder: PackedVit) -> None:
    if encoder.backend.device.type == "cuda":
        torch.cuda.synchronize(encoder.backend.device)


def _spread(spread: Spread, form: str) -> str:
    return f"{form.format(spread.median)} ({form.format(spread.least)} to {form.format(spread.most)})"


if __name__ == "__main__":
    sys.exit(execute(slicing))
