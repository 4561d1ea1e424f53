"""Levels, threads and forks: what belongs to the process, not to one kernel."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest
import torch

from dashinfer_vlm.kernels import cpu_ops

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
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


def with_little_memory(code: str) -> str:
    """What `code` prints in a process of its own; `allow(mib)` in it bounds the address space to that much more."""
    begin = """
import resource, torch
from dashinfer_vlm.kernels import cpu_ops as c
def allow(mib):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, resource.RLIM_INFINITY))
"""
    result = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@linux
@needs_kernels
def test_threads_that_cannot_be_started_are_counted_in_an_error() -> None:
    code = """
x, w = torch.randn(40, 64), c.pack_linear(torch.randn(300, 64))
want = c.linear(x, w)
c.set_num_threads(200)
allow(64)
try:
    c.linear(x, w)
except RuntimeError as error:
    print(error)
c.set_num_threads(1)
assert torch.equal(c.linear(x, w), want)
"""
    assert re.match(r"only \d+ of 200 compute threads could be started: ", with_little_memory(code))


@linux
@needs_kernels
def test_a_thread_without_memory_costs_the_call_alone() -> None:
    code = """
def likeliest(rows):
    return c.likeliest(rows, torch.arange(len(rows), dtype=torch.int32), torch.zeros(len(rows), dtype=torch.int32), 0)
wide, narrow = torch.zeros(32, 500_000), torch.zeros(32, 100)
c.set_num_threads(1)
likeliest(wide)  # the caller's own buffer
c.set_num_threads(3)
likeliest(narrow)  # threads are there
allow(4)
try:
    likeliest(wide)
except MemoryError:
    print("too wide")
assert likeliest(narrow).ranks.tolist() == [1] * 32
"""
    assert with_little_memory(code) == "too wide\n"


@needs_kernels
def test_a_number_of_threads_for_which_there_is_no_memory_changes_nothing() -> None:
    before = cpu_ops.num_threads()
    with pytest.raises(MemoryError):
        cpu_ops.set_num_threads(2**31 - 1)
    assert cpu_ops.num_threads() == before


@needs_kernels
def test_tensors_without_the_fast_exchange_are_accepted() -> None:
    x = torch.randn(3, 8)
    packed = cpu_ops.pack_linear(torch.randn(5, 8))
    out = torch.empty(3, 5)
    cpu_ops.extension().linear(x.numpy(), packed.handle, None, out, "none", None)
    assert torch.equal(out, cpu_ops.linear(x, packed))
