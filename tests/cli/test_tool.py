"""`dashinfer-vlm` and its subcommands."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dashinfer_vlm
from dashinfer_vlm.cli.command import execute
from dashinfer_vlm.cli.options import reference_page
from dashinfer_vlm.cli.tool import ELSEWHERE, tool


def test_version_names_the_package_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(tool, ["version"]) == 0
    assert f"dashinfer-vlm {dashinfer_vlm.__version__}, torch " in capsys.readouterr().out


def test_flags_prints_the_page_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(tool, ["flags"]) == 0
    assert capsys.readouterr().out == reference_page()


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_subcommands_of_other_modules_have_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(tool, [name, "-h"]) == 0
    assert name in capsys.readouterr().out


def test_an_unknown_subcommand_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(tool, ["bnech"]) == 2
    error = capsys.readouterr().err
    assert "No such command 'bnech'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("bnech", "did you mean bench?"), ("batch", "dashinfer-vlm run answers"), ("zzz", "-h lists the commands")],
)
def test_a_near_miss_is_told_what_was_meant(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(tool, [typed]) == 2
    assert hint in capsys.readouterr().err


CLOSED = """
import os, subprocess, sys
import click
from dashinfer_vlm.cli.command import execute

@click.command("x")
def command():
    sys.stdout.isatty(), sys.stderr.isatty()
    opened = os.open("/dev/zero", os.O_RDONLY)
    child = subprocess.run([sys.executable, "-c", "import sys; sys.exit(sys.stdout is None)"])
    sys.exit(opened < 3 or child.returncode)

sys.exit(execute(command, []))
"""


def test_standard_streams_that_are_closed_are_opened_to_nothing() -> None:
    """As some supervisors start a server."""
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", CLOSED], timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("module", ["dashinfer_vlm", "dashinfer_vlm.cli.serve"])
def test_both_commands_say_their_version_without_torch(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"dashinfer-vlm {dashinfer_vlm.__version__}\n")
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]
