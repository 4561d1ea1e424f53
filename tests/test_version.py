"""Versions come from tags, through what was installed."""

from __future__ import annotations

from importlib.metadata import version

import dashinfer_vlm


def test_the_package_knows_its_version() -> None:
    assert dashinfer_vlm.__version__ == version("dashinfer-vlm")
