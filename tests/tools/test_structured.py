"""What structured output costs, measured by its tool."""

from __future__ import annotations

import json

import pytest

import structured


def test_the_tool_runs_as_its_help_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["structured.py", "--streams", "2", "--tokens", "4", "--rounds", "1"])
    structured.main()
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)
