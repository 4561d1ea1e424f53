"""Checkpoints that are stored quantised, beside the same numbers written out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.config import read_config
from make_checkpoint import published_experts

__all__ = ["Tensors", "Write", "assert_refused", "write_pair"]

QUANTISED = ("_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight", ".in_proj_qkvz.weight")

Tensors = dict[str, Tensor]
Write = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""What stands for the weight `X.weight` of the layer `X`, by whole names, and the numbers that it stands for."""


def _copied(origin: Path, folder: Path, settings: dict[str, Any] | None) -> None:
    """All but the weights, with `quantization_config`."""
    for path in origin.glob("*.json"):
        shutil.copy(path, folder)
    if settings is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def write_pair(origin: Path, to: Path, settings: dict[str, Any], write: Write) -> tuple[Path, Path]:
    """Two folders: stored as `settings` say, and the same numbers written out. Quantised is what published checkpoints
    quantise: the text model's linear layers, not its head and not the ViT; experts one by one."""
    stored, written = to / "stored", to / "written"
    for folder, said in ((stored, settings), (written, None)):
        folder.mkdir()
        _copied(origin, folder, said)
    as_stored: Tensors = {}
    whole: Tensors = {}
    tensors = load_file(origin / "model.safetensors")
    for name, tensor in chain.from_iterable(starmap(_one_by_one, tensors.items())):
        found, whole[name] = {name: tensor}, tensor
        if name.endswith(QUANTISED) and "visual" not in name:
            found, whole[name] = write(name.removesuffix(".weight"), tensor)
        as_stored |= {key: x.contiguous() for key, x in found.items()}
    save_file(as_stored, stored / "model.safetensors")
    save_file(whole, written / "model.safetensors")
    return stored, written


def _one_by_one(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Experts that lie in one tensor, [E, 2I, H] or [E, H, I], as they are published when they are quantised."""
    return list(published_experts(name, tensor, "qwen3_moe")) if tensor.ndim == 3 else [(name, tensor)]


def assert_refused(origin: Path, folder: Path, settings: dict[str, Any], message: str) -> None:
    """A checkpoint whose `quantization_config` is `settings`."""
    _copied(origin, folder, settings)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)
