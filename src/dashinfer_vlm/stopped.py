"""Whether a child process was stopped by a signal: it lives, and will not answer."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_stopped"]


def is_stopped(pid: int) -> bool:
    """By SIGSTOP or a debugger, as far as the system tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] in "Tt"
    except OSError:
        return False
