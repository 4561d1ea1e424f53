"""What an engine says about itself in one line."""

from __future__ import annotations

import logging

import msgspec
import pytest

from dashinfer_vlm.cli.logs import announce
from tests.engine.scripted import INFO


@pytest.mark.parametrize(
    ("text", "vision", "expected"),
    [
        ("none", "none", "bfloat16"),
        ("a16w4", "none", "bfloat16 with a16w4"),
        ("none", "a8w8", "bfloat16 with vision a8w8"),
        ("a16w4", "a8w8", "bfloat16 with a16w4 and vision a8w8"),
    ],
)
def test_the_loaded_line_names_the_quantisation(
    text: str, vision: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    info = msgspec.structs.replace(INFO, dtype="bfloat16", quant_type=text, vision_quant_type=vision)
    with caplog.at_level(logging.INFO):
        announce("model", info)
    assert f" on cpu as {expected}, KV cache" in caplog.text


@pytest.mark.parametrize("lora", [None, "adapters/mine"])
def test_an_adapter_has_a_line_of_its_own(lora: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        announce("model", msgspec.structs.replace(INFO, lora=lora))
    assert ("The LoRA adapter in adapters/mine is merged into its weights" in caplog.text) == (lora is not None)
