"""The card itself, its ceilings, and the compilation of everything."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from card_checks.results import Check, Setting
from card_checks.rows import Row
from dashinfer_vlm.envs import keep_compiled_kernels

TOOLS = Path(__file__).resolve().parents[1]


def ceilings(setting: Setting) -> Iterator[Check]:
    """Copy bandwidth and a large product; all ratios of the other phases are to these."""
    yield "copy", partial(_copy, setting)
    yield "product", partial(_product, setting)


def _copy(setting: Setting) -> Row:
    size = 1 << (20 if setting.tiny else 31)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = setting.time(lambda: target.copy_(source))
    setting.ceilings.bytes_per_s = 2 * size / seconds
    return Row(seconds=seconds, note=f"{setting.ceilings.bytes_per_s / 1e12:.3f} TB/s; {_versions(setting)}")


def _product(setting: Setting) -> Row:
    side = 256 if setting.tiny else 8192
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
    seconds = setting.time(lambda: a @ b)
    setting.ceilings.flops_per_s = 2 * side**3 / seconds
    return Row(seconds=seconds, note=f"{side}^3: {setting.ceilings.flops_per_s / 1e12:.1f} TFLOP/s")


def _versions(setting: Setting) -> str:
    name = platform.processor() or platform.machine()
    if setting.device.type == "cuda":
        name = torch.cuda.get_device_name(setting.device)
    triton = importlib.metadata.version("triton")
    versions = f"torch {torch.__version__}, triton {triton}, CUDA {torch.version.cuda}"
    return f"{name}, {versions}, Python {platform.python_version()}"


def compile_all(setting: Setting) -> Iterator[Check]:
    """Every variant of the published models, then what the checks themselves ask for, by as many processes as there are
    cores; the kernels' cache has them afterwards."""
    few = ("--model", "Qwen2-VL-2B", "--first", "2")
    yield "compile models", partial(_compile, setting, *(few if setting.tiny else ()))
    if not setting.tiny:
        yield "compile checks", partial(_compile, setting, "--checks")


def _compile(setting: Setting, *what: str) -> Row:
    keep_compiled_kernels()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    num_parts = 1 if setting.tiny else len(os.sched_getaffinity(0))
    command = [sys.executable, str(TOOLS / "compile_kernels.py"), "--goes-on", *what]
    if setting.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(setting.device)
        command += ["--target", str(10 * major + minor)]
    begin = time.perf_counter()
    started = [
        subprocess.Popen([*command, "--part", f"{i}/{num_parts}"], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(num_parts)
    ]
    lines = [json.loads(line) for process in started for line in process.communicate()[0].splitlines()]
    # exact sines of angles beyond 100,000 reduce them in local memory, which counts as spilt here
    spilt = [f"{x['model']}: {x['variant']}" for x in lines if x.get("spills_in_loops") and x["kernel"] != "_tables"]
    failed = [f"{x['model']}: {x['variant']}: {x['failed']}" for x in lines if "failed" in x]
    failed += [f"{x['model']}: {x['variant']} reads from a wrong address" for x in lines if x.get("raw_descriptors")]
    failed += [f"{x['model']}: {x['variant']} overwrites a factor" for x in lines if x.get("overwritten_factors")]
    ended = sorted({process.returncode for process in started})
    note = f"{len(lines)} kernels, {num_parts} processes; spills in loops: {', '.join(spilt) or 'none'}"
    wrong = 0.0 if ended == [0] and not failed else float("nan")
    if failed or ended != [0]:
        note += f"; exit {ended}; failed: {'; '.join(failed)}"
    return Row(seconds=time.perf_counter() - begin, error=wrong, allowed=0, note=note)
