"""`dashinfer-vlm bench serve` as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dashinfer_vlm.cli.bench import bench
from dashinfer_vlm.cli.command import execute
from tests.bench.stand_in import Script, served

SMALL = ["--clients", "2", "--requests", "4", "--rounds", "1", "--warmup", "0", "--output-tokens", "4"]


def test_the_last_line_is_one_json_object_and_a_table_stands_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Script("ours")) as url, served(Script("peer")) as other:
        targets = ["--target", f"ours={url}", "--target", f"peer={other}", "--pid", f"ours={os.getpid()}"]
        code = execute(bench, ["serve", *targets, "--workload", "text", "--seed", "3", "--api-key", "secret", *SMALL])

    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert code == 0
    assert any("requests/s" in line for line in shown)
    assert [one["name"] for one in result["results"]] == ["ours", "peer"]
    assert [one["num_replies"] for one in result["results"]] == [4, 4]
    assert result["results"][0]["peak_memory_bytes"] > 0
    assert result["results"][1]["peak_memory_bytes"] is None
    assert set(result["ratios"]) == {"ours"}
    assert (result["settings"]["seed"], result["settings"]["output_tokens"]) == (3, 4)
    assert "secret" not in last


def test_a_failed_request_is_shown_and_ends_in_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Script(fail=frozenset({2}))) as url:
        code = execute(bench, ["serve", "--target", f"ours={url}", "--workload", "text", *SMALL])

    assert code == 1
    assert "ours: 1 failed: HTTP 503: no room for request 2" in capsys.readouterr().out


def test_a_breakdown_of_somebody_elses_server_is_refused_and_the_rest_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served(Script("peer")) as url:
        code = execute(bench, ["serve", "--target", f"peer={url}", "--workload", "text", "--breakdown", *SMALL])

    out = capsys.readouterr().out
    assert code == 0
    assert f"no breakdown: peer has no metrics at {url}/metrics" in out
    assert json.loads(out.splitlines()[-1])["results"][0]["breakdown"] is None


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "waits.svg"
    with served(Script()) as url:
        code = execute(bench, ["serve", "--target", f"ours={url}", "--workload", "text", "--plot", str(file), *SMALL])

    assert code == 0
    assert "time to first token" in file.read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no --target is given"),
        (["--target", "a=http://h", "--pid", "a=x"], "--pid is 'a=x'; it must be NAME=PID"),
        (["--target", "a=http://h", "--image-size", "4x"], "--image-size is '4x'"),
        (["--target", "a=http://h", "--image-size", "60000"], "--image-size is 60000; it must be at most 8192"),
        (["--target", "a=http://h", "--seconds", "inf"], "--seconds is inf; it must be at most 86400"),
        (["--target", "a=http://h", "--plot", "waits.doc"], "must end in .png"),
        (["--target", "a=http://h", "--workload", "other"], "'other'"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(bench, ["serve", *args]) == 2
    assert message in capsys.readouterr().err
