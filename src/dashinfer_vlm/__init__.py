"""DashInfer-VLM: serve Qwen vision-language models; the vision encoder and the LLM run as separate stages."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from dashinfer_vlm.frontend.params import GenerationParams
    from dashinfer_vlm.offline import VLM
    from dashinfer_vlm.request import Grammar, SamplingParams

__all__ = ["VLM", "GenerationParams", "Grammar", "SamplingParams", "__version__"]

_HOMES = {
    "VLM": "dashinfer_vlm.offline",
    "GenerationParams": "dashinfer_vlm.frontend.params",
    "Grammar": "dashinfer_vlm.request",
    "SamplingParams": "dashinfer_vlm.request",
}
"""Imported when they are first used: they bring torch, which `dashinfer_vlm_serve -h` does not need."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("dashinfer-vlm")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
