"""Training state on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """A reader, or a run that was killed half way, never sees half a file."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
