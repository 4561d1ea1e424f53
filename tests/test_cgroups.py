"""What control groups allow, read from stand-ins of the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashinfer_vlm.cgroups import cpu_quota, free_memory

MIB = 2**20
UNLIMITED_V1 = str(2**63 - 4096)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def v2(folder: str, limit: str, used: int, file_pages: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {file_pages // 2}\nactive_file {file_pages // 2}\nshmem 7"
    return {
        f"sys/fs/cgroup{folder}/memory.max": limit,
        f"sys/fs/cgroup{folder}/memory.current": str(used),
        f"sys/fs/cgroup{folder}/memory.stat": stat,
    }


def v1(folder: str, limit: str, used: int, file_pages: int = 0) -> dict[str, str]:
    stat = f"inactive_file 3\ntotal_inactive_file {file_pages}\ntotal_active_file 0"
    return {
        f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes": limit,
        f"sys/fs/cgroup/memory{folder}/memory.usage_in_bytes": str(used),
        f"sys/fs/cgroup/memory{folder}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (v2("", "max", 10 * MIB), None),
        (v2("", str(100 * MIB), 30 * MIB), 70 * MIB),
        (v2("", str(100 * MIB), 90 * MIB, file_pages=60 * MIB), 70 * MIB),
        (v2("", str(100 * MIB), 110 * MIB), 0),
        ({"proc/self/cgroup": "0::/a/b", **v2("/a", str(50 * MIB), 20 * MIB), **v2("/a/b", "max", MIB)}, 30 * MIB),
        ({"proc/self/cgroup": "0::/a/b", **v2("/a", str(90 * MIB), 0), **v2("/a/b", str(9 * MIB), 0)}, 9 * MIB),
        ({"proc/self/cgroup": "0::/elsewhere", **v2("", str(8 * MIB), 0)}, 8 * MIB),
        (v1("", UNLIMITED_V1, 10 * MIB), None),
        (v1("", str(100 * MIB), 80 * MIB, file_pages=30 * MIB), 50 * MIB),
        ({"proc/self/cgroup": "4:memory:/pod/box\n0::/", **v1("/pod/box", str(7 * MIB), MIB)}, 6 * MIB),
        ({"proc/self/cgroup": "4:cpu,memory:/pod", **v1("/pod", UNLIMITED_V1, 0), **v1("", str(5 * MIB), 0)}, 5 * MIB),
    ],
)
def test_the_narrowest_group_around_us_says_what_is_free(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    write(tmp_path, files)
    assert free_memory(tmp_path) == free


def test_quotas_of_nested_groups_of_version_1_count(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "1:cpu,cpuacct:/pod",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000",
        },
    )
    assert cpu_quota(tmp_path) == 1.5
