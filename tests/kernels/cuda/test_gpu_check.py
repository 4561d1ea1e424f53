"""The check of a card, rehearsed without one: every phase runs, on the interpreted kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]

import gpu_check
from card_checks import lending, ranks, worker
from card_checks.results import Check, Setting
from card_checks.rows import Row, table
from dashinfer_vlm.layers.backend import choose_backend
from dashinfer_vlm.layers.linear import Matrix
from gpu_check import Watch

TINY = Setting(torch.device("cpu"), tiny=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Rows by their names, by phases."""
    out = tmp_path_factory.mktemp("check") / "out.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, out.read_text().splitlines()):
        found.setdefault(line["phase"], {})[line["row"]["name"]] = line["row"]
    return found


@pytest.mark.cards
@pytest.mark.timeout(600)
def test_a_rehearsal_runs_every_phase_and_finds_nothing_wrong(told: dict[str, dict[str, Any]]) -> None:
    assert list(told) == list(gpu_check.PHASES)


@pytest.mark.cards
def test_every_family_answers_with_the_tokens_of_the_cpu(told: dict[str, dict[str, Any]]) -> None:
    from card_checks.models import USUAL
    from make_checkpoint import RECIPES

    assert all(told["families"][f"tokens of a tiny {arch}, {USUAL}"]["error"] == 0 for arch in RECIPES)


@pytest.mark.cards
def test_what_is_measured_has_a_floor(told: dict[str, dict[str, Any]]) -> None:
    for phase in ("timed", "tiles", "products", "shapes", "steps", "published", "beside"):
        assert all(row["ratio"] > 0 for row in told[phase].values()), phase


@pytest.mark.cards
def test_products_are_timed_in_every_precision(told: dict[str, dict[str, Any]]) -> None:
    for row in told["products"].values():
        assert row["others"].keys() == {"bare", "a16w8", "a16w4", "fp8"}


def run(checks: Iterator[Check], stop: float = float("inf"), done: frozenset[str] = frozenset()) -> list[Any]:
    messages: list[dict[str, Any]] = []
    worker.run_phase(checks, TINY, messages.append, stop, done)
    return [message["begins"] if "begins" in message else Row(**message["row"]) for message in messages]


def right() -> Row:
    return Row(error=0.0, allowed=0.1)


def wrong() -> Row:
    raise ZeroDivisionError("no card")


def test_a_check_that_fails_is_a_wrong_row_and_the_others_go_on() -> None:
    begins, failed, *others = run(iter([("first", wrong), ("last", right)]))
    assert (begins, failed.verdict) == ("first", "WRONG")
    assert "ZeroDivisionError: no card" in failed.note
    assert 'raise ZeroDivisionError("no card")' in failed.note  # the whole traceback
    assert others == ["last", Row(name="last", error=0.0, allowed=0.1)]


def test_a_phase_that_cannot_prepare_a_check_says_so() -> None:
    def checks() -> Iterator[Check]:
        yield "first", right
        wrong()

    assert [row.verdict for row in run(checks())[1:]] == ["ok", "WRONG"]


def test_what_is_done_is_not_done_again() -> None:
    assert run(iter([("first", wrong), ("last", right)]), done=frozenset({"first"}))[0] == "last"


def test_a_phase_ends_when_its_time_is_up() -> None:
    (row,) = run(iter([("first", right), ("last", right)]), stop=-1)
    assert (row.name, row.note) == ("out of time", "left out from 'first' on")


def test_a_card_that_is_lost_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(_: Setting) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Setting, "wait", wait)
    with pytest.raises(worker.CardLostError):
        run(iter([("first", right)]))


DIES = """
import json, os, sys, time
measured = False
def tell(phase, **message):
    print(json.dumps({"phase": phase} | message), flush=True)
for phase, _, _, done in json.loads(sys.argv[1]):
    for name in ("a", "b", "c"):
        if name in done:
            continue
        tell(phase, begins=name)
        if (phase, name) == ("kernels", "b"):
            os.abort()
        measured = measured or phase == "ceilings"
        if (phase, name) == ("steps", "a"):
            time.sleep(100)
        tell(phase, row={"name": name, "error": 0.0, "floor": 1.0 if measured else float("nan")})
    tell(phase, ends=True)
"""
"""In place of a worker: dies in one check, hangs in another."""


def test_another_process_goes_on_behind_a_check_that_kills_or_hangs(tmp_path: Path) -> None:
    def command(phases: object, _: float) -> list[str]:
        return [sys.executable, "-S", "-c", DIES, json.dumps(phases)]

    with (tmp_path / "out").open("w+") as out:
        watch = Watch(command, ["ceilings", "kernels", "steps"], out, hang_s=1.5)
        watch.run()
        found = {f"{phase} {name}": row for (phase, name), row in watch.found.items()}
        out.seek(0)
        assert len(out.readlines()) == len(found) == 9
    assert {name for name, row in found.items() if row.verdict == "WRONG"} == {"kernels b", "steps a"}
    assert "status -6" in found["kernels b"].note
    assert found["kernels c"].floor == found["steps c"].floor == 1.0  # by the ceilings of its own process


def test_ceilings_that_kill_their_process_are_given_up() -> None:
    def command(phases: list[tuple[str, str, float, list[str]]], _: float) -> list[str]:
        broken = DIES.replace('("kernels", "b")', '("ceilings", "b")')
        return [sys.executable, "-S", "-c", broken, json.dumps(phases)]

    watch = Watch(command, ["ceilings", "kernels"])
    watch.run()
    assert [name for name, row in watch.found.items() if row.verdict == "WRONG"] == [("ceilings", "b")]
    assert ("kernels", "c") in watch.found


Block = tuple[int, str, list[str]]


def segment(*blocks: Block, pool: int = 0) -> dict[str, Any]:
    """As torch tells of one: `blocks` are sizes, states, and the lines that asked, the innermost first."""
    told = [
        {"size": size, "state": state, "frames": [{"filename": name, "line": 7, "name": "f"} for name in files]}
        for size, state, files in blocks
    ]
    return {"segment_pool_id": (0, pool), "blocks": told}


OURS = ["torch/nn/functional.py", "src/dashinfer_vlm/layers/cuda.py", "src/dashinfer_vlm/models/decoder.py"]


def test_a_workspace_that_a_library_has_taken_is_told_from_what_requests_leave() -> None:
    """One block by the line of a product; as many as requests by another line."""
    small = (2048, "active_allocated", ["src/dashinfer_vlm/models/vit.py"])
    kept: Block = (1 << 20, "active_allocated", [])
    free: Block = (1 << 22, "inactive", [])
    before = lending.blocks_of([segment(small, kept, free), segment((4096, "active_allocated", []))])
    workspace = (1 << 25, "active_allocated", OURS)
    after = lending.blocks_of([segment(workspace, kept), segment(*[small] * 1001, free, pool=1)])
    assert lending.num_bytes(after) == (1 << 25) + (1 << 20) + 1001 * 2048
    assert lending.told(before, after) == (
        "new: 1 of 32.000 MiB by cuda.py:7, 1001 of 0.002 MiB by vit.py:7 in a graph, others 0.000 MiB; gone: 0.006 MiB"
    )
    assert lending.told(after, after) == "new: none, others 0.000 MiB; gone: 0.000 MiB"


def test_the_kinds_that_take_most_are_named() -> None:
    sizes = [1 << n for n in range(20, 30)]
    after = lending.blocks_of([segment(*((size, "active_allocated", []) for size in sizes))])
    told = lending.told(lending.blocks_of([]), after)
    assert told.startswith("new: 1 of 512.000 MiB by nobody known, 1 of 256.000 MiB")
    assert told.endswith("1 of 16.000 MiB by nobody known, others 15.000 MiB; gone: 0.000 MiB")


def test_the_only_rank_of_a_group_asks_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its check would show nothing."""
    asked: list[str] = []
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(distributed, name, lambda *_, name=name: asked.append(name))
    one, x = ranks.OneOfOne(), torch.ones(2, 3)
    backend = replace(choose_backend(x.device, x.dtype), ranks=one)
    weight = Matrix("weight", 2, 3, lambda: x)
    backend.summed(weight)(x)
    backend.head(weight)(x)
    one.broadcast(x)
    one.least(1, x.device)
    assert asked == ["all_reduce", "all_gather", "broadcast", "all_reduce"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; print('busy', flush=True); time.sleep(60)", "was killed by signal SIGKILL; it said: busy"),
        ("raise SystemExit('no ranks')", "ended with status 1; it said: no ranks"),
        ("import sys; sys.stdin.read()", "was killed by signal SIGKILL"),  # it waits for the end of who started it
    ],
)
def test_ranks_that_hang_or_fail_are_ended_and_say_what_they_said(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "running", lambda *_: (sys.executable, "-S", "-c", code))
    monkeypatch.setattr(ranks, "REHEARSAL_S", 1.0)
    (_, check), *_ = ranks.ranks(TINY)
    with pytest.raises(RuntimeError, match=said):
        check()


def test_verdicts() -> None:
    assert Row(seconds=1.4, floor=1.0, bar=1.5).verdict == "ok"
    assert Row(seconds=1.6, floor=1.0, bar=1.5).verdict == "slow"
    assert Row(error=float("nan"), allowed=1).verdict == "WRONG"
    assert Row(error=0.2, allowed=0.1).verdict == "WRONG"
    assert Row(seconds=1.0).verdict == ""
    assert "1.60" in table([Row(name="slow one", seconds=1.6, floor=1.0, bar=1.5, others={"torch": 0.001})])
