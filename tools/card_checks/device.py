"""The card itself, its ceilings, and the compilation of everything."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from card_checks.results import Row, Setting

TOOLS = Path(__file__).resolve().parents[1]


def ceilings(setting: Setting) -> Iterator[Row]:
    """Copy bandwidth and a large product; all ratios of the other phases are to these."""
    size = 1 << (20 if setting.tiny else 31)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = setting.time(lambda: target.copy_(source))
    setting.ceilings.bytes_per_s = 2 * size / seconds
    yield Row("copy", seconds, note=f"{setting.ceilings.bytes_per_s / 1e12:.3f} TB/s; {_versions(setting)}")
    side = 256 if setting.tiny else 8192
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
    seconds = setting.time(lambda: a @ b)
    setting.ceilings.flops_per_s = 2 * side**3 / seconds
    yield Row(f"product {side}^3", seconds, note=f"{setting.ceilings.flops_per_s / 1e12:.1f} TFLOP/s")


def _versions(setting: Setting) -> str:
    name = platform.processor() or platform.machine()
    if setting.device.type == "cuda":
        name = torch.cuda.get_device_name(setting.device)
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"


def compile_all(setting: Setting) -> Iterator[Row]:
    """Every variant of the published models, the models side by side; the kernels' cache has them afterwards."""
    begin = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOLS / "compile_kernels.py")]
    models = ["Qwen2-VL-2B"] if setting.tiny else ["Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B"]
    few = ["--first", "2"] if setting.tiny else []
    if setting.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(setting.device)
        few += ["--target", str(10 * major + minor)]
    started = [
        subprocess.Popen([*command, "--model", model, *few], stdout=subprocess.PIPE, text=True, env=environment)
        for model in models
    ]
    for model, process in zip(models, started, strict=True):
        lines = [json.loads(line) for line in process.communicate()[0].splitlines()]
        # exact sines of angles beyond 100,000 reduce them in local memory, which counts as spilt here
        spilt = [x["variant"] for x in lines if x["spills"] and x["kernel"] != "_tables"]
        wrong = 0.0 if process.returncode == 0 and not spilt else float("nan")
        seconds = time.perf_counter() - begin
        note = f"{len(lines)} variants; spills: {', '.join(spilt) or 'none'}"
        yield Row(f"compile {model}", seconds, error=wrong, allowed=0, note=note)
