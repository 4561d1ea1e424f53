"""The folder keeps what fits, forgets what was used least recently, and never stops a start."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from dashinfer_vlm.kernels.cpu_ops import PackedWeight
from dashinfer_vlm.models import quant_cache as folders
from dashinfer_vlm.models.quant_cache import QuantFolder

Weights = dict[str, PackedWeight]
GIB = 2**30


def folder_of(path: Path, limit_bytes: int = GIB) -> QuantFolder:
    return QuantFolder(path / "cache", limit_bytes)


def names(folder: QuantFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


def size_of(weights: Weights) -> int:
    return sum(weight.num_bytes for weight in weights.values())


def test_what_was_written_is_found(tmp_path: Path, weights: Weights) -> None:
    folder = folder_of(tmp_path)
    assert folder.open("a.safetensors", "mine") is None
    assert folder.write("a.safetensors", "mine", weights)
    entry = folder.open("a.safetensors", "mine")
    assert entry is not None
    entry.close()
    assert names(folder) == {"a.safetensors"}


def test_what_was_used_least_recently_makes_room(tmp_path: Path, weights: Weights) -> None:
    folder = folder_of(tmp_path, 3 * size_of(weights) + 20_000)  # headers count as well
    for age, name in enumerate(("a.safetensors", "b.safetensors", "c.safetensors")):
        folder.write(name, "mine", weights)
        os.utime(folder.path / name, (1000 + age, 1000 + age))
    entry = folder.open("a.safetensors", "mine")  # used now
    assert entry is not None
    entry.close()
    folder.write("d.safetensors", "mine", weights)
    assert names(folder) == {"a.safetensors", "c.safetensors", "d.safetensors"}


def test_a_file_that_is_removed_while_it_is_read_stays_readable(tmp_path: Path, weights: Weights) -> None:
    folder = folder_of(tmp_path, size_of(weights) + 9000)
    folder.write("a.safetensors", "mine", weights)
    entry = folder.open("a.safetensors", "mine")
    assert entry is not None
    folder.write("b.safetensors", "mine", weights)
    assert names(folder) == {"b.safetensors"}
    assert bytes(entry.read("a", weights["a"].shape).panels) == bytes(weights["a"].panels)
    entry.close()


def test_what_is_larger_than_the_limit_is_not_kept_and_removes_nothing(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path).write("a.safetensors", "mine", weights)
    small = folder_of(tmp_path, size_of(weights) - 1)
    assert not small.write("b.safetensors", "mine", weights)
    assert names(small) == {"a.safetensors"}
    assert "--quant-cache-gib allows" in caplog.text


def test_a_full_disk_is_left_alone(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(folders.RESERVE_BYTES))
    assert not folder_of(tmp_path).write("a.safetensors", "mine", weights)
    assert names(folder_of(tmp_path)) == set()
    assert "1.00 GiB free" in caplog.text


def test_a_folder_that_cannot_be_made_costs_a_line_in_the_log(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert not folder_of(tmp_path).write("a.safetensors", "mine", weights)
    assert "quantised weights are not kept" in caplog.text


def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, identity: str, weights: Weights) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(folders, "write_entry", fail)
    assert not folder_of(tmp_path).write("a.safetensors", "mine", weights)
    assert names(folder_of(tmp_path)) == set()


def test_what_a_killed_process_left_is_swept_up_after_an_hour(tmp_path: Path, weights: Weights) -> None:
    folder = folder_of(tmp_path)
    folder.path.mkdir()
    for name, age_s in (("old.unfinished", folders.UNFINISHED_S + 60), ("new.unfinished", 60)):
        (folder.path / name).write_bytes(b"half")
        os.utime(folder.path / name, (time.time() - age_s,) * 2)
    folder.write("a.safetensors", "mine", weights)
    assert names(folder) == {"a.safetensors", "new.unfinished"}


def test_several_writers_at_once_leave_one_whole_file(tmp_path: Path, weights: Weights) -> None:
    folder = folder_of(tmp_path)
    kept: list[bool] = []
    writers = [
        threading.Thread(target=lambda: kept.append(folder.write("a.safetensors", "mine", weights))) for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert kept == [True] * 4
    assert names(folder) == {"a.safetensors"}
    entry = folder.open("a.safetensors", "mine")
    assert entry is not None
    entry.close()


def test_a_damaged_file_costs_a_line_in_the_log(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path)
    folder.write("a.safetensors", "mine", weights)
    (folder.path / "a.safetensors").write_bytes(b"x" * 100)
    assert folder.open("a.safetensors", "mine") is None
    assert "header is damaged" in caplog.text


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose time stamps are to be trusted."""
    monkeypatch.setattr(folders, "RACY_NS", -(10**12))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_an_unchanged_file_is_read_once(tmp_path: Path, settled: Path) -> None:
    folder, answers = folder_of(tmp_path), iter([b"1" * 32, b"2" * 32, b"3" * 32])

    def ask(part: str = "text") -> bytes:
        return folder.remembered([settled], part, lambda: next(answers))

    assert ask() == ask() == b"1" * 32
    assert ask("vision") == b"2" * 32
    settled.write_bytes(b"others!")
    os.utime(settled, (1000, 1000))  # as if it were old
    assert ask() == b"3" * 32


def test_a_file_that_changed_just_now_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    answers = iter([b"1" * 32, b"2" * 32])
    for expected in (b"1" * 32, b"2" * 32):
        assert folder_of(tmp_path).remembered([path], "text", lambda: next(answers)) == expected


def test_a_damaged_memory_is_asked_no_more(tmp_path: Path, settled: Path) -> None:
    folder = folder_of(tmp_path)
    folder.remembered([settled], "text", lambda: b"1" * 32)
    (seen,) = folder.path.glob("*.seen")
    for damage in ("31" * 31, "zz" * 32, ""):
        seen.write_text(damage)
        assert folder.remembered([settled], "text", lambda: b"2" * 32) == b"2" * 32


def test_memories_do_not_pile_up(
    tmp_path: Path, settled: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MAX_SEEN", 2)
    folder = folder_of(tmp_path)
    for part in ("a", "b", "c"):
        folder.remembered([settled], part, lambda: b"1" * 32)
    folder.write("a.safetensors", "mine", weights)
    assert len(list(folder.path.glob("*.seen"))) == 2
