"""Where a measurement was made, as far as it matters for comparing figures."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine"]

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    features: tuple[str, ...]
    """Instruction sets, of those that change what a model costs."""
    num_cores: int
    memory_gib: float
    system: str
    python: str

    @classmethod
    def here(cls) -> Machine:
        """This machine; on systems without /proc the processor's details stay empty."""
        cpu = _fields("/proc/cpuinfo")
        flags = set(cpu.get("flags", "").split())
        memory_kib = _fields("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
        return cls(
            cpu=cpu.get("model name", platform.processor() or platform.machine()),
            features=tuple(name for name in _CPU_FEATURES if name in flags),
            num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_gib=round(int(memory_kib) / 2**20, 1),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
        )

    def __str__(self) -> str:
        return f"{self.cpu}, {self.num_cores} cores ({' '.join(self.features)}), {self.memory_gib} GiB, {self.system}"


def _fields(path: str) -> dict[str, str]:
    """`name : value` lines; the first of each name."""
    file = Path(path)
    if not file.is_file():
        return {}
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
