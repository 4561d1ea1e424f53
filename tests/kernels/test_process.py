"""Levels, threads and forks: what belongs to the process, not to one kernel."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops

needs_kernels = pytest.mark.skipif(not cpu_ops.available(), reason=f"no native kernels: {cpu_ops.why_unavailable()}")


@needs_kernels
def test_the_environment_forces_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu_ops.isa()
    for wanted in cpu_ops.levels():
        monkeypatch.setenv("DASHINFER_KERNELS", wanted)
        cpu_ops._load()
        assert cpu_ops.isa() == wanted
    cpu_ops.set_isa(before)


def test_reference_makes_the_kernels_unavailable_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHINFER_KERNELS", "reference")
    module, why = cpu_ops._load()
    assert module is None
    assert why == "DASHINFER_KERNELS=reference"


@needs_kernels
def test_an_unknown_level_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHINFER_KERNELS", "avx1024")
    known = ", ".join([*cpu_ops.levels(), "auto", "reference"])
    with pytest.raises(ValueError, match=f"level 'avx1024' cannot run here; choose one of: {known}"):
        cpu_ops._load()


def test_calling_an_unavailable_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "_module", None)
    monkeypatch.setattr(cpu_ops, "_why_unavailable", "no compiler")
    assert not cpu_ops.available()
    assert cpu_ops.why_unavailable() == "no compiler"
    with pytest.raises(RuntimeError, match="not available: no compiler"):
        cpu_ops.pack_linear(torch.zeros(1, 1))


@needs_kernels
def test_at_least_one_thread_is_demanded() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cpu_ops.set_num_threads(0)


def test_callers_on_many_threads_do_not_disturb_each_other(num_threads: int) -> None:
    x, packed = torch.randn(40, 64), cpu_ops.pack_linear(torch.randn(300, 64))
    want = cpu_ops.linear(x, packed)
    results: list[bool] = []

    def call() -> None:
        results.append(all(torch.equal(cpu_ops.linear(x, packed), want) for _ in range(50)))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 4, num_threads


@needs_kernels
def test_a_forked_child_gets_threads_of_its_own() -> None:
    code = """
import os, torch
from dashinfer_vlm.kernels import cpu_ops as c
c.set_num_threads(2)
x, w = torch.randn(40, 64), c.pack_linear(torch.randn(300, 64))
want = c.linear(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if c.num_threads() == 2 and torch.equal(c.linear(x, w), want) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"


@needs_kernels
def test_tensors_without_the_fast_exchange_are_accepted() -> None:
    x = torch.randn(3, 8)
    packed = cpu_ops.pack_linear(torch.randn(5, 8))
    out = torch.empty(3, 5)
    cpu_ops.extension().linear(x.numpy(), packed.handle, None, out, "none", None)
    assert torch.equal(out, cpu_ops.linear(x, packed))
