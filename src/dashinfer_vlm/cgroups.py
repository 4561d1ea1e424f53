"""What the control groups around this process allow it, in both versions of the kernel's interface; the narrowest of a
group and those around it counts, as far as a container shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "free_memory"]

_UNLIMITED_V1 = 1 << 60
"""Version 1 has no word for "no limit", only a number beyond any machine's memory."""


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time; None means no limit."""
    quotas = [_quota_v2(group) for group in _groups(root, "")]
    quotas += [_quota_v1(group) for group in _groups(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken; pages of files count as free, since the kernel gives them up first. None is no
    limit."""
    found = [
        _free(group / "memory.max", group / "memory.current", group / "memory.stat", "") for group in _groups(root, "")
    ]
    found += [
        _free(group / "memory.limit_in_bytes", group / "memory.usage_in_bytes", group / "memory.stat", "total_")
        for group in _groups(root, "memory")
    ]
    return min((free for free in found if free is not None), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those around it: of version 1's `controller`, of version 2 for ""."""
    top, own = root / "sys/fs/cgroup" / controller, ""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path.strip("/")
    folder = top / own
    yield folder
    yield from (parent for parent in folder.parents if parent == top or top in parent.parents)


def _quota_v2(group: Path) -> float | None:
    file = group / "cpu.max"
    if not file.exists():
        return None
    quota, period = file.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(group: Path) -> float | None:
    files = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
    if not all(file.exists() for file in files):
        return None
    quota, period = (int(file.read_text()) for file in files)
    return None if quota < 0 else quota / period


def _free(limit: Path, used: Path, stat: Path, prefix: str) -> int | None:
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text().strip()
    if text == "max" or int(text) >= _UNLIMITED_V1:
        return None
    return max(0, int(text) - int(used.read_text()) + _file_pages(stat, prefix))


def _file_pages(stat: Path, prefix: str) -> int:
    """Bytes of files that are in memory and could be read again."""
    if not stat.exists():
        return 0
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    rows = (line.split() for line in stat.read_text().splitlines())
    return sum(int(row[1]) for row in rows if row[0] in names)
