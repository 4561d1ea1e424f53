"""What an encoder on another machine has where it is, in place of what the server says."""

from __future__ import annotations

import pytest

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.encoders.cluster.actor import _localised

SAID = EngineConfig(model="/server/model", lora="/server/adapter", vision_workers=1, vision_threads=3)


def test_folders_are_the_servers_unless_this_machine_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    there = _localised(SAID)
    assert (there.model, there.lora, there.threads) == ("/server/model", "/server/adapter", 3)
    monkeypatch.setenv("DASHINFER_ENCODER_LORA", "/here/adapter")
    assert (_localised(SAID).model, _localised(SAID).lora) == ("/server/model", "/here/adapter")
    monkeypatch.setenv("DASHINFER_ENCODER_MODEL", "/here/model")
    assert (_localised(SAID).model, _localised(SAID).lora) == ("/here/model", "/here/adapter")
