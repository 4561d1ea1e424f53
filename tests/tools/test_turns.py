"""What the prefix cache spares of a second turn, measured by its tool."""

from __future__ import annotations

import json

import pytest

import turns
from tests.conftest import CheckpointMaker


def test_the_second_turn_about_a_picture_finds_a_saved_state(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("qwen3_5"))
    monkeypatch.setattr("sys.argv", ["turns.py", "--model", folder, "--side", "320", "--rounds", "1", "--tokens", "2"])
    turns.main()
    *_, last = capsys.readouterr().out.splitlines()
    without, found = json.loads(last)["results"]
    assert without["cached_tokens"] == 0
    assert 100 < found["cached_tokens"] < found["prompt_tokens"] == without["prompt_tokens"]
