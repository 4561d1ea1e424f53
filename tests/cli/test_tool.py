"""`dashinfer-vlm` and its subcommands."""

from __future__ import annotations

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
