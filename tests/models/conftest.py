"""Each family once, ours and the reference, on each implementation of the layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.models.base import Model
from tests.conftest import CheckpointMaker
from tests.models import driving

NATIVE_IS_HERE = cpu_ops.available()


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, checkpoint: CheckpointMaker) -> Path:
    return checkpoint(request.param)


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """The module's checkpoint, to be changed."""
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    return driving.load_hf(folder)


@pytest.fixture(scope="module", params=["native", "reference"])
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    if request.param == "native" and not NATIVE_IS_HERE:
        pytest.skip(str(cpu_ops.why_unavailable()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_ops, "available", lambda: request.param == "native")
        return driving.load(folder)
