"""Compute threads: shares of the cores, and what a process's threads may run on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dashinfer_vlm import cores
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops, threads
from dashinfer_vlm.kernels.threads import engine_cores, engine_threads, vision_threads, worker_cores
from tests.conftest import CheckpointMaker

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity masks and names of sockets are Linux's")
needs_kernels = pytest.mark.skipif(not cpu_ops.available(), reason=f"no native kernels: {cpu_ops.why_unavailable()}")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: list(range(8)))


def test_engine_and_workers_share_the_cores() -> None:
    shared = EngineConfig(vision_workers=1)
    assert (engine_threads(shared), vision_threads(shared)) == (4, 4)
    assert engine_threads(EngineConfig(vision_workers=3, vision_threads=1)) == 5
    assert engine_threads(EngineConfig(vision_workers=1, threads=7)) == 7
    assert engine_threads(EngineConfig()) == 8


@pytest.mark.parametrize("settings", [{"vision_device": "cuda"}, {"device": "cuda"}, {"cluster": "host:6379"}])
def test_workers_that_compute_elsewhere_take_no_cores(settings: dict[str, str]) -> None:
    config = EngineConfig(vision_workers=1, cores="auto", **settings)  # type: ignore[arg-type]
    assert engine_threads(config) == 8
    assert worker_cores(config, 0) is None


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("listed", ["auto", "0-7", "1,3,5,7,9,11,13,15"])
def test_no_core_is_in_two_shares(listed: str, workers: int) -> None:
    config = EngineConfig(vision_workers=workers, cores=listed)
    shares = [engine_cores(config), *(worker_cores(config, number) for number in range(workers))]
    together = [core for share in shares for core in share or []]
    assert all(shares)
    assert len(together) == len(set(together)) <= 8


def test_without_the_flag_nobody_is_pinned() -> None:
    assert engine_cores(EngineConfig(vision_workers=1)) is None
    assert worker_cores(EngineConfig(vision_workers=1), 0) is None


def test_more_threads_than_cores_are_refused_with_both_numbers() -> None:
    config = EngineConfig(vision_workers=1, threads=6, vision_threads=3, cores="auto")
    assert engine_cores(config) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="--cores auto means 8 cores, too few for 9 compute threads"):
        worker_cores(config, 0)


def test_a_list_that_is_none_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="'0-x' is not a list of cores"):
        EngineConfig(cores="0-x").validate()


@linux
@needs_kernels
def test_pinned_threads_run_on_their_cores_and_the_caller_on_all_of_them() -> None:
    code = """
import os, pathlib, torch
from dashinfer_vlm.cores import usable_cores
from dashinfer_vlm.kernels.threads import set_threads, stay_on
from dashinfer_vlm.kernels import cpu_ops
mine = usable_cores()[:2]
set_threads(len(mine), mine)
stay_on(mine)
cpu_ops.linear(torch.randn(64, 512), cpu_ops.pack_linear(torch.randn(4096, 512)))
masks = {int(task.name): os.sched_getaffinity(int(task.name)) for task in pathlib.Path("/proc/self/task").iterdir()}
assert masks[os.getpid()] == set(mine), masks
assert [mask for mask in masks.values() if mask == {mine[-1]}], masks
print(len(mine))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip(), result.stderr


@linux
@needs_kernels
@pytest.mark.skipif(len(cores.usable_cores()) < 2, reason="an engine and a worker need a core each")
def test_an_engine_and_its_worker_run_on_cores_of_their_own(checkpoint: CheckpointMaker) -> None:
    code = f"""
import os
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.cores import usable_cores
from dashinfer_vlm.engine.load import load_engine
cores = usable_cores()
listed = f"{{cores[0]}},{{cores[1]}}"
config = EngineConfig(model={str(checkpoint())!r}, device="cpu", kv_cache_gib=0.5, vision_workers=1, cores=listed)
engine, _ = load_engine(config, lambda stage, done, total: None)
try:
    (worker,) = (encoder.pid for encoder in engine.stage.crew.encoders)
    assert os.sched_getaffinity(0) == {{cores[0]}}, os.sched_getaffinity(0)
    assert os.sched_getaffinity(worker) == {{cores[1]}}, os.sched_getaffinity(worker)
finally:
    engine.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@linux
def test_a_core_is_pinned_by_one_process_until_it_ends() -> None:
    core = min(cores._allowed())
    code = f"from dashinfer_vlm.cores import claim; claim([{core}]); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    late = [sys.executable, "-c", f"from dashinfer_vlm.cores import claim; claim([{core}]); claim([{core}])"]
    refused = subprocess.run(late, capture_output=True, text=True, check=False)
    assert f"core {core} is pinned by another process" in refused.stderr
    holder.kill()
    holder.communicate()
    assert subprocess.run(late, check=False).returncode == 0


@linux
def test_a_core_outside_the_mask_is_named() -> None:
    with pytest.raises(ConfigError, match="names core 4095; this process may use"):
        cores.claim([4095])


@linux
@needs_kernels
def test_weights_are_spread_over_the_nodes_that_they_were_told_of() -> None:
    code = """
import torch
from dashinfer_vlm.kernels import cpu_ops
cpu_ops.set_memory_nodes([0])
large, small = cpu_ops.pack_linear(torch.randn(4096, 4096)), cpu_ops.pack_linear(torch.randn(64, 64))
print(sum("interleave" in line for line in open("/proc/self/numa_maps")))
"""
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("this system tells nothing of memory nodes")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 2


@linux
@needs_kernels
def test_a_node_that_is_not_there_is_refused_and_nothing_changes() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_ops.set_memory_nodes([1000])
    cpu_ops.pack_linear(torch.randn(64, 64))
    with pytest.raises(ValueError, match="-1 is no memory node"):
        cpu_ops.set_memory_nodes([-1])
