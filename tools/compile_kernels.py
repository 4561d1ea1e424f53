#!/usr/bin/env python3
"""Compile every kernel for a card that is not there, and tell what the compiler made of it.

    compile_kernels.py [--target 90] [--model Qwen2-VL-7B]... [--only ViT] [--first 5]

Prints one JSON object a line: model, variant, kernel, registers, bytes of stack, spills, bytes of shared memory, and
how often the instructions occur that decide the speed: `HGMMA` (products of a warp group), `HMMA` (of a warp), `QGMMA`
(of a warp group, 8-bit floats), and asynchronous copies, those of 128 bits apart; sines that are only approximate.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from dashinfer_vlm.kernels.cuda import launch as launching

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    model: str
    variant: str
    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    hgmma: int
    hmma: int
    qgmma: int
    copies: int
    wide_copies: int
    fast_sines: int


class AbsentCard:
    """What triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """In place of `launch`: compiles, and runs nothing."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[str, Any]] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        self.seen.setdefault(id(compiled), (kernel.__name__, compiled))

    def take(self) -> list[tuple[str, Any]]:
        """Those that were compiled since the last call."""
        found, self.seen = list(self.seen.values()), {}
        return found


def compile_all(
    models: list[str], capability: int, first: int | None = None, only: str = "", part: int = 0, num_parts: int = 1
) -> Iterator[Compiled]:
    """Every variant, or the `first` ones, whose name has `only` in it, of the published `models` in bfloat16, for cards
    of compute capability `capability` / 10; of `num_parts` equal parts of them, one."""
    triton.runtime.driver.set_active(AbsentCard(capability))
    recorder = Recorder()
    launching.launch = recorder  # before the kernels' modules take it
    from dashinfer_vlm.kernels.cuda.variants import PUBLISHED, variants

    for model in models or PUBLISHED:
        found = (x for x in variants(PUBLISHED[model], torch.bfloat16) if only in x.name)
        for variant in islice(found, part, first, num_parts):
            variant.call()
            for kernel, compiled in recorder.take():
                yield _read(model, variant.name, kernel, compiled)


def _read(model: str, variant: str, kernel: str, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(
        model,
        variant,
        kernel,
        int(registers),
        int(stack),
        len(re.findall(r"\bSTL\b", code)),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        len(re.findall(r"\bHGMMA\b", code)),
        len(re.findall(r"\bHMMA\b", code)),
        len(re.findall(r"\bQGMMA\b", code)),
        len(re.findall(r"\bLDGSTS\b", code)),
        len(re.findall(r"\bLDGSTS\S*\.128", code)),
        len(re.findall(r"\bMUFU\.(?:SIN|COS)\b", code)),
    )


def _dump(flag: str, file: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--model", action="append", default=[], help="a published model; all when none is named")
    parser.add_argument("--first", type=int, help="variants of each model; all when absent")
    parser.add_argument("--only", default="", help="what the variant's name has in it")
    parser.add_argument("--part", default="0/1", help="1/4: the second quarter of all, for processes side by side")
    options = parser.parse_args()
    part, num_parts = map(int, options.part.split("/"))
    for compiled in compile_all(options.model, options.target, options.first, options.only, part, num_parts):
        print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
