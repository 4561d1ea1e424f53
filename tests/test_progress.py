"""Loading on a terminal and in a log file."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from dashinfer_vlm.progress import LoadingProgress


def test_a_terminal_sees_a_bar_per_stage() -> None:
    screen = io.StringIO()
    with LoadingProgress(Console(file=screen, force_terminal=True, width=100)) as progress:
        progress("weights", 0, 200)
        progress("weights", 200, 200)
        progress("kernels", 1, 2)
    last = screen.getvalue().rsplit("Loading weights", 1)[1]
    assert "100 %" in last
    assert "Loading kernels" in last
    assert "50 %" in last


def test_a_log_file_gets_a_line_per_quarter(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    screen = io.StringIO()
    with LoadingProgress(Console(file=screen)) as progress:
        for done in range(101):
            progress("weights", done, 100)
    assert screen.getvalue() == ""
    assert caplog.messages == [f"Loading weights: {share} %" for share in (0, 25, 50, 75, 100)]


def test_nothing_to_load_is_all_loaded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dashinfer_vlm")
    LoadingProgress(Console(file=io.StringIO()))("weights", 0, 0)
    assert caplog.messages == ["Loading weights: 100 %"]
