"""Sections of `docs/reliability.md` that the tools write: between two marks, and nothing else of the page."""

from __future__ import annotations

from datetime import date
from pathlib import Path

__all__ = ["write_section"]


def write_section(page: str | Path, name: str, text: str) -> None:
    """Put `text`, dated, between the marks of section `name`; raises ValueError where the page has none."""
    path = Path(page)
    before, start, rest = path.read_text().partition(f"<!-- {name}: made by a tool -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not start or not end:
        raise ValueError(f"{path} has no section {name!r}")
    path.write_text(f"{before}{start}\n{text}\n\nMeasured on {date.today().isoformat()}.\n\n{end}{after}")
