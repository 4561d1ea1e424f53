"""Which family serves which `architectures` name. A renamed architecture is one more row."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from dashinfer_vlm.errors import CheckpointError

if TYPE_CHECKING:
    from dashinfer_vlm.models.family import Family

__all__ = ["FAMILIES", "family_of"]

_FAMILIES = "dashinfer_vlm.models.families"

FAMILIES: dict[str, tuple[str, str]] = {
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "Qwen2VL"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen25VL"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "Qwen3VL"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl", "Qwen3VLMoe"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "Qwen35"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "Qwen35Moe"),
    "Qwen2ForCausalLM": ("qwen_text", "Qwen2"),
    "Qwen3ForCausalLM": ("qwen_text", "Qwen3"),
    "Qwen3MoeForCausalLM": ("qwen_text", "Qwen3Moe"),
    "Qwen3ForSequenceClassification": ("qwen_text", "Qwen3Classifier"),
    "Qwen3NextForCausalLM": ("qwen3_next", "Qwen3Next"),
    "Qwen3_5ForCausalLM": ("qwen3_5", "Qwen35Text"),
    "Qwen3_5MoeForCausalLM": ("qwen3_5", "Qwen35TextMoe"),
}
"""Module below `families`, class of the family."""


@cache
def family_of(architecture: str) -> Family:
    """The family of an `architectures` name, its module imported now. Raises CheckpointError for an unknown name."""
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}")
    module, name = FAMILIES[architecture]
    family: Family = getattr(import_module(f"{_FAMILIES}.{module}"), name)()
    return family
