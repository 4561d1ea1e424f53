"""The check of a card, rehearsed without one: every phase runs, on the interpreted kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]

import gpu_check
from card_checks.results import Row, Setting, table

TINY = Setting(torch.device("cpu"), tiny=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("check") / "out.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {line["phase"]: line["rows"] for line in lines}


@pytest.mark.timeout(600)
def test_a_rehearsal_runs_every_phase_and_finds_nothing_wrong(told: dict[str, list[dict[str, object]]]) -> None:
    assert list(told) == list(gpu_check.PHASES)
    assert all(told.values())


def test_every_family_answers_with_the_tokens_of_the_cpu(told: dict[str, list[dict[str, object]]]) -> None:
    from make_checkpoint import RECIPES

    equal = {row["name"]: row["error"] for row in told["families"]}
    assert all(equal[f"tokens of a tiny {arch}"] == 0 for arch in RECIPES)


def test_what_is_measured_has_a_floor(told: dict[str, list[dict[str, object]]]) -> None:
    for phase in ("timed", "shapes", "steps", "published", "beside"):
        assert all(row["ratio"] > 0 for row in told[phase]), phase  # type: ignore[operator]


def test_a_phase_that_fails_is_a_wrong_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setting: Setting) -> Iterator[Row]:
        yield Row("first", error=0.0, allowed=0.1)
        raise ZeroDivisionError("no card")

    monkeypatch.setitem(gpu_check.PHASES, "ceilings", (fails, 10))
    monkeypatch.setitem(gpu_check.PHASES, "beside", (lambda _: iter([Row("last")]), 10))
    assert gpu_check.main(["--device", "cpu", "--tiny", "--only", "beside"]) == 1
    rows = gpu_check.run_phase("ceilings", TINY, 0)
    assert [(row.name, row.verdict) for row in rows] == [("first", "ok"), ("ceilings: ZeroDivisionError", "WRONG")]


def test_a_phase_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.PHASES, "beside", (lambda _: iter([Row("a"), Row("b")]), -1))
    rows = gpu_check.run_phase("beside", Setting(torch.device("cpu"), tiny=False), 0)
    assert [row.name for row in rows] == ["a", "beside: out of time"]


def test_verdicts() -> None:
    assert Row("", 1.4, 1.0, 1.5).verdict == "ok"
    assert Row("", 1.6, 1.0, 1.5).verdict == "slow"
    assert Row("", error=float("nan"), allowed=1).verdict == "WRONG"
    assert Row("", error=0.2, allowed=0.1).verdict == "WRONG"
    assert Row("", 1.0).verdict == ""
    assert "1.60" in table([Row("slow one", 1.6, 1.0, 1.5)])
