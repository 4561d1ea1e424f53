"""Memory that asks for huge pages: large weights and the KV cache are read whole in every step, and 4 KiB pages cost
a quarter of the bandwidth.
"""

from __future__ import annotations

import math
import mmap
import re
from pathlib import Path

import torch

__all__ = ["huge_pages", "huge_zeros", "in_huge_pages", "sent"]

HUGE_PAGE_BYTES = 2 << 20


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeroed CPU tensor `shape` in transparent huge pages where the system has them; pages come when first touched."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    # private: shared anonymous memory is tmpfs to the kernel, which has a switch of its own for huge pages
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # the tensor keeps the mapping alive


def in_huge_pages(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous CPU copy of `tensor` as `dtype`, in huge pages; never aliases its argument."""
    return huge_zeros(tuple(tensor.shape), dtype).copy_(tensor)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, as soon as what follows there needs it. A plain copy would wait for all that a card has
    still to do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def huge_pages(root: Path = Path("/")) -> str:
    """One clause for the log: the system's setting, and how much of this process's own memory is in huge pages."""
    setting, usage = root / "sys/kernel/mm/transparent_hugepage/enabled", root / "proc/self/smaps_rollup"
    if not (setting.exists() and usage.exists()):
        return "transparent huge pages: the system has none"
    chosen = re.search(r"\[(\w+)\]", setting.read_text())
    kib = dict(re.findall(r"^(\w+): +(\d+) kB$", usage.read_text(), re.MULTILINE))
    huge, own = int(kib["AnonHugePages"]) / 2**20, int(kib["Anonymous"]) / 2**20
    return f"transparent huge pages: {chosen[1] if chosen else 'unknown'}, {huge:.2f} of {own:.2f} GiB are in them"
