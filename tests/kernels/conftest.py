"""Every test of this folder runs once per instruction level that this machine can run, and, where `make test-isa` has
built them, once per emulated level: the same sources with functions in place of AVX-512 and AMX instructions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops

REPOSITORY = Path(__file__).parents[2]
SOURCES = [*(REPOSITORY / "src/dashinfer_vlm/kernels/cpu").iterdir(), Path(__file__).with_name("emulated_isa.h")]
EMULATED_LEVELS = ["amx", "avx512_bf16", "avx512"]


def load_emulated() -> ModuleType | str:
    """The extension module of the emulated build, or why there is none."""
    found = list((REPOSITORY / "build/isa").glob("_cpu.*.so"))
    if not found:
        return "AVX-512 and AMX are emulated after `make test-isa`"
    if any(source.stat().st_mtime > found[0].stat().st_mtime for source in SOURCES):
        return "the emulated build is older than its sources; run `make test-isa`"
    spec = importlib.util.spec_from_file_location("emulated._cpu", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EMULATED = load_emulated()
REAL_LEVELS = cpu_ops.levels() if cpu_ops.available() else ["unavailable"]
LEVELS = REAL_LEVELS + [f"emulated {name}" for name in EMULATED_LEVELS if not isinstance(EMULATED, str)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name: str = request.param
    if name.startswith("emulated "):
        monkeypatch.setattr(cpu_ops, "_module", EMULATED)
    elif not cpu_ops.available():
        pytest.skip(f"no native kernels: {cpu_ops.why_unavailable()}")
    before = cpu_ops.isa()
    cpu_ops.set_isa(name.removeprefix("emulated "))
    torch.manual_seed(0)
    yield name
    cpu_ops.set_isa(before)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if isinstance(EMULATED, str):
        pytest.skip(EMULATED)
    monkeypatch.setattr(cpu_ops, "_module", EMULATED)
    return EMULATED


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest, level: str) -> Iterator[int]:
    before = cpu_ops.num_threads()
    cpu_ops.set_num_threads(request.param)
    yield request.param
    cpu_ops.set_num_threads(before)
