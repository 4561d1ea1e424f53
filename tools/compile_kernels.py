#!/usr/bin/env python3
"""Compile every kernel for a card that is not there, and tell what the compiler made of it.

    compile_kernels.py [--target 90] [--model Qwen2-VL-7B]... | [--checks] [--only ViT] [--first 5]

Prints one JSON object a line: model, variant, kernel, registers, bytes of stack, spills, those in loops, bytes of
shared memory, and how often the instructions occur that decide the speed: `HGMMA` (products of a warp group), `HMMA`
(of a warp), `QGMMA` (of a warp group, 8-bit floats), and asynchronous copies, of these the ones of 128 bits, and those
of whole tiles; how many groups of copies may be under way while one is waited for; sines that are only approximate;
reads of 128 bits before a kernel waits for the one before it; products that read from a wrong address, and instructions
that write over a factor of one under way (see sass.py); exponentials with a product of a warp group under way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability

from dashinfer_vlm.kernels.cuda import launch as launching
from sass import listings, machine_code, overwritten_factors, raw_descriptors

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    model: str
    variant: str
    kernel: str
    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    shared: int
    warps: int
    hgmma: int
    hmma: int
    qgmma: int
    copies: int
    wide_copies: int
    tile_copies: int
    copies_under_way: int
    fast_sines: int
    wide_reads_before_wait: int
    raw_descriptors: int
    overwritten_factors: int
    exponentials_beside_products: int


@dataclass(frozen=True, slots=True)
class Failed:
    model: str
    variant: str
    failed: str


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

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, early: bool = False, **options: Any
    ) -> None:
        if early:
            options["launch_pdl"] = True
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        self.seen.setdefault(id(compiled), (kernel.__name__, compiled))

    def take(self) -> list[tuple[str, Any]]:
        """Those that were compiled since the last call."""
        found, self.seen = list(self.seen.values()), {}
        return found


@dataclass(frozen=True, slots=True)
class Work:
    model: str
    variant: str
    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Kernel:
    """What triton made of a kernel that a piece of work asked for."""

    model: str
    variant: str
    name: str
    compiled: Any


def compile_all(work: Iterable[Work], recorder: Recorder, *, goes_on: bool = False) -> Iterator[Kernel | Failed]:
    """What each piece of work asks for. With `goes_on` a piece that fails is told, and the next one begins."""
    for piece in work:
        try:
            piece.call()
        except Exception as error:
            if not goes_on:
                raise
            yield Failed(piece.model, piece.variant, f"{type(error).__name__}: {str(error)[:300]}")
        for kernel, compiled in recorder.take():
            yield Kernel(piece.model, piece.variant, kernel, compiled)


def record(capability: int) -> Recorder:
    """Has kernels compiled for cards of compute capability `capability` / 10 in place of being started; to be called
    before their modules are imported."""
    triton.runtime.driver.set_active(AbsentCard(capability))
    recorder = Recorder()
    launching.launch = recorder
    return recorder


def of_models(models: list[str]) -> Iterator[Work]:
    """Every variant of published models in bfloat16."""
    from dashinfer_vlm.kernels.cuda.variants import MIXTURES, PUBLISHED, variants

    for model in models or (*PUBLISHED, *MIXTURES):
        for variant in variants(model, torch.bfloat16):
            yield Work(model, variant.name, variant.call)


def of_checks() -> Iterator[Work]:
    """What `gpu_check.py` asks for beside that, on tensors without memory."""
    from card_checks import families, kernels, products, tiles
    from card_checks.results import Setting
    from make_checkpoint import RECIPES

    setting = Setting(torch.device("meta"), tiny=False)
    for dtype, small in ((torch.bfloat16, True), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False)):
        for case in kernels.cases(setting, dtype, small=small):
            yield Work("check", f"{case.name} {dtype}", case.run)
    for name, way in (*products.every_way(setting), *tiles.every_tile(setting)):
        yield Work("check", name, way)
    for arch in RECIPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield Work("check", f"tiny {arch} {dtype}", partial(families.call_everything, setting, arch, dtype))


def read_all(kernels: list[Kernel], capability: int) -> Iterator[Compiled]:
    """What several variants ask for is read once."""
    first = {id(kernel.compiled): kernel for kernel in kernels}
    codes = [machine_code(kernel.compiled.asm["cubin"]) for kernel in first.values()]
    architecture = sm_arch_from_capability(capability).replace("sm_", "SM")
    rows = map(_read, first.values(), listings(codes, architecture, TOOLS / "nvdisasm"))
    read = dict(zip(first, rows, strict=True))
    for kernel in kernels:
        yield replace(read[id(kernel.compiled)], model=kernel.model, variant=kernel.variant)


def _read(kernel: Kernel, code: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(
        kernel.model,
        kernel.variant,
        kernel.name,
        int(registers),
        int(stack),
        len(re.findall(r" STL\b", code)),
        _spills_in_loops(code),
        kernel.compiled.metadata.shared,
        kernel.compiled.metadata.num_warps,
        len(re.findall(r" HGMMA\b", code)),
        len(re.findall(r" HMMA\b", code)),
        len(re.findall(r" QGMMA\b", code)),
        len(re.findall(r" LDGSTS\b", code)),
        len(re.findall(r" LDGSTS\S*\.128", code)),
        len(re.findall(r" UTMALDG\b", code)),
        max((int(left, 16) for left in re.findall(r" DEPBAR\.LE SB0, (0x[0-9a-f]+)", code)), default=0),
        len(re.findall(r" MUFU\.(?:SIN|COS)\b", code)),
        len(re.findall(r" LDG\S*\.128", code.partition("ACQBULK")[0])),
        len(raw_descriptors(code)),
        len(overwritten_factors(code)),
        _exponentials_beside_products(code),
    )


def _exponentials_beside_products(code: str) -> int:
    """Those between a product and the next wait for one, in the order of the listing."""
    steps = re.findall(r" (HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2)\b", code)
    under_way = accumulate(steps, lambda held, step: held if step == "MUFU.EX2" else step)
    return sum(step == "MUFU.EX2" and held == "HGMMA" for step, held in zip(steps, under_way, strict=True))


def _spills_in_loops(code: str) -> int:
    """Writes and reads of spilt registers from which a way leads back to them. Where a branch goes back to is not
    enough: waits for tiles stand behind the end, and go back to the middle."""
    if not re.search(r" (?:STL|LDL)\b", code):
        return 0
    places = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    ways: dict[int, list[int]] = {}
    for (at, text), (following, _) in pairwise([*places, (-1, "")]):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        ends = re.match(r"(?:BRA(?:\.\w+)* 0x|EXIT|RET)", text)  # without a condition
        ways[at] = ([int(target[1], 16)] if target else []) + ([] if ends else [following])
    spilt = (at for at, text in places if re.search(r"\b(?:STL|LDL)\b", text))
    return sum(_leads_back(at, ways) for at in spilt)


def _leads_back(start: int, ways: dict[int, list[int]]) -> bool:
    seen: set[int] = set()
    ahead = list(ways[start])
    while ahead:
        at = ahead.pop()
        if at == start:
            return True
        if at not in seen:
            seen.add(at)
            ahead += ways.get(at, ())
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--model", action="append", default=[], help="a published model; all when none is named")
    parser.add_argument("--checks", action="store_true", help="what gpu_check.py asks for beside the models")
    parser.add_argument("--first", type=int, help="variants; all when absent")
    parser.add_argument("--only", default="", help="a regular expression for the variant's name")
    parser.add_argument("--part", default="0/1", help="1/4: the second quarter of all, for processes side by side")
    parser.add_argument("--goes-on", action="store_true", help="tell what fails, and go on")
    options = parser.parse_args()
    part, num_parts = map(int, options.part.split("/"))
    recorder = record(options.target)
    work = of_checks() if options.checks else of_models(options.model)
    without = "fp8" if options.target < 89 else None  # such cards multiply no 8-bit floats
    chosen = (x for x in work if re.search(options.only, x.variant) and not (without and without in x.variant))
    kernels = []
    for found in compile_all(islice(chosen, part, options.first, num_parts), recorder, goes_on=options.goes_on):
        if isinstance(found, Kernel):
            kernels.append(found)
        else:
            print(json.dumps(asdict(found)), flush=True)
    for compiled in read_all(kernels, options.target):
        print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
