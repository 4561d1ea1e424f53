"""Arrays for a vision worker wait for shared memory that is about to come free."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from dashinfer_vlm import shared_array
from dashinfer_vlm.encoders.elsewhere import wire
from dashinfer_vlm.encoders.elsewhere.wire import read_tensor, write_tensor


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[OSError]:
    """What the next attempts to take memory raise."""
    errors: list[OSError] = []
    put = shared_array.put

    def full(*args: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return put(*args)

    monkeypatch.setattr(wire, "put", full)
    monkeypatch.setattr(wire, "_LOOK_S", 0.0)
    return errors


def test_an_array_waits_until_there_is_room(tmp_path: Path, refusals: list[OSError]) -> None:
    refusals += [OSError(errno.ENOSPC, "full")] * 3
    assert read_tensor(write_tensor(tmp_path, torch.ones(2, 3), "a")).tolist() == [[1, 1, 1]] * 2
    assert refusals == []


def test_it_does_not_wait_for_ever(tmp_path: Path, refusals: list[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ROOM_TIMEOUT_S", -1.0)
    refusals += [OSError(errno.ENOSPC, "full")] * 2
    with pytest.raises(OSError, match="full"):
        write_tensor(tmp_path, torch.ones(1), "a")


def test_other_errors_are_told_at_once(tmp_path: Path, refusals: list[OSError]) -> None:
    refusals += [OSError(errno.EACCES, "closed")] * 2
    with pytest.raises(OSError, match="closed"):
        write_tensor(tmp_path, torch.ones(1), "a")
    assert len(refusals) == 1
