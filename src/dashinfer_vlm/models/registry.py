"""Which class serves which `architectures` name. A renamed architecture is one more row."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dashinfer_vlm.errors import CheckpointError

__all__ = ["ARCHITECTURES", "model_class", "vision_class"]

ARCHITECTURES: dict[str, tuple[str, str, str]] = {
    "Qwen2VLForConditionalGeneration": ("dashinfer_vlm.models.qwen2_vl", "Qwen2VL", "Qwen2VLVision"),
    "Qwen2_5_VLForConditionalGeneration": ("dashinfer_vlm.models.qwen2_5_vl", "Qwen25VL", "Qwen25VLVision"),
}
"""Module, class of the whole model, class of its ViT."""


def model_class(architecture: str) -> Any:
    """The class for an `architectures` name, its module imported now. Raises CheckpointError for an unknown name."""
    module, name, _ = _row(architecture)
    return getattr(import_module(module), name)


def vision_class(architecture: str) -> Any:
    """The class of the ViT alone, as `model_class`."""
    module, _, name = _row(architecture)
    return getattr(import_module(module), name)


def _row(architecture: str) -> tuple[str, str, str]:
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]
