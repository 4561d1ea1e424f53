"""Which cores there are, read from stand-ins of the kernel's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dashinfer_vlm.cores import memory_nodes, parse_list, usable_cores
from dashinfer_vlm.errors import ConfigError


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def siblings(root: Path, pairs: dict[int, str]) -> None:
    for cpu, text in pairs.items():
        write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", text)


@pytest.mark.usefixtures("eight")
def test_where_nothing_is_known_every_processor_of_the_mask_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == list(range(8))


@pytest.mark.usefixtures("eight")
def test_one_hardware_thread_of_each_core_counts(tmp_path: Path) -> None:
    siblings(tmp_path, {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    assert usable_cores(tmp_path) == [0, 1, 2, 3]


def test_a_core_whose_first_hardware_thread_is_forbidden_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    siblings(tmp_path, {1: "1,5", 4: "0,4", 5: "1,5"})
    assert usable_cores(tmp_path) == [1, 4]


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("files", "num"),
    [
        ({"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "350000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            2,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 5),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_quota_of_any_group_around_us_limits_the_cores(tmp_path: Path, files: dict[str, str], num: int) -> None:
    for name, text in files.items():
        write(tmp_path, name, text)
    assert usable_cores(tmp_path) == list(range(num))


def test_nodes_are_those_of_the_cores_and_a_node_of_memory_alone_is_none(tmp_path: Path) -> None:
    for node, local in {0: "0-3,8-11", 1: "4-7,12-15", 10: ""}.items():
        write(tmp_path, f"sys/devices/system/node/node{node}/cpulist", local)
    assert memory_nodes([0, 1], tmp_path) == [0]
    assert memory_nodes([3, 4], tmp_path) == [0, 1]
    assert memory_nodes([20], tmp_path) == []


def test_lists_are_read_as_the_kernel_writes_them() -> None:
    assert parse_list("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert parse_list("3,1,3") == [1, 3]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1 2"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a list of cores"):
        parse_list(text)
