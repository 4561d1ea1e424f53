"""Packages that are not there are named, with the extra that brings them."""

from __future__ import annotations

import sys

import pytest

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.optional import require


def test_a_package_that_is_there_is_imported() -> None:
    assert require("json", "none", "a test") is sys.modules["json"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"a tower needs transformers.*pip install 'dashinfer-vlm\[transformers\]'"):
        require("transformers", "transformers", "a tower")
