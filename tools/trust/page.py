"""Sections of `docs/reliability.md` that the tools write."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from dashinfer_vlm.bench.machine import Machine
from peers.pages import put

__all__ = ["write_section"]


def write_section(page: str | Path, name: str, text: str) -> None:
    """Put `text` between the marks of section `name`, with the day and the machine; raises ValueError without marks."""
    path = Path(page)
    path.write_text(put(path.read_text(), name, f"{text}\n\nMeasured on {date.today()}: {Machine.here()}."))
