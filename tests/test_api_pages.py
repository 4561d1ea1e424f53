"""The reference pages say what the source says."""

from __future__ import annotations

import subprocess
import sys

import allspark
from tests.conftest import ROOT

TOOL = ROOT / "tools" / "api_pages.py"


def test_the_api_pages_are_current() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_that_allspark_exports_is_on_its_page() -> None:
    page = (ROOT / "docs" / "api" / "allspark.md").read_text(encoding="utf-8")
    for name in allspark.__all__:
        assert f"## `{name}" in page, name
