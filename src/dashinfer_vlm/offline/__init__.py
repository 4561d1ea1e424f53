"""The offline Python API: a model in this process, conversations in, answers out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dashinfer_vlm.frontend.answers import Answer
    from dashinfer_vlm.offline.encoder import EncodedPrompt, Encoder
    from dashinfer_vlm.offline.results import Result
    from dashinfer_vlm.offline.vlm import VLM

__all__ = ["VLM", "Answer", "EncodedPrompt", "Encoder", "Result"]

_HOMES = {
    "Answer": "dashinfer_vlm.frontend.answers",
    "EncodedPrompt": "dashinfer_vlm.offline.encoder",
    "Encoder": "dashinfer_vlm.offline.encoder",
    "Result": "dashinfer_vlm.offline.results",
    "VLM": "dashinfer_vlm.offline.vlm",
}
"""Imported when they are first used: some bring torch, which pipes of requests, in the same room, do without."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
