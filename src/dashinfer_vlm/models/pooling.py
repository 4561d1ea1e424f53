"""Whether a checkpoint was published for vectors: sentence-transformers' files say so, and how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.tokenizer_file import read_json

__all__ = ["read_why_no_vectors"]

_MODULES = "modules.json"
_LAST = "lasttoken"
_POOLING_MODE = "pooling_mode"


class _Module(msgspec.Struct):
    type: str
    path: str = ""


def read_why_no_vectors(folder: Path) -> str | None:
    """None where `modules.json` has the model, then nothing but the pooling of its last token and a norm of length 1.
    Otherwise what is missing, or what is asked for that nothing here computes. Raises CheckpointError for a file that
    cannot be read.
    """
    path = folder / _MODULES
    if not path.is_file():
        return f"it has no {_MODULES} of sentence-transformers"
    try:
        modules = msgspec.json.decode(path.read_bytes(), type=list[_Module])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not a list of modules: {error}") from error
    for module in modules[1:]:  # the first one is the model itself, sometimes by a class of its publisher's
        kind = module.type.rpartition(".")[2]
        if kind == "Pooling":
            mode = _pooling(read_json(folder / module.path / "config.json"))
            if mode != _LAST:
                return f"its pooling is {mode!r}, and {_LAST!r} is supported"
        elif kind != "Normalize":
            return f"its {_MODULES} names {kind}, which is not supported"
    return None


def _pooling(config: dict[str, Any]) -> str:
    """By its name, or by the one flag of many that is set."""
    if isinstance(named := config.get(_POOLING_MODE), str):
        return named
    prefix = f"{_POOLING_MODE}_"
    return "+".join(name.removeprefix(prefix) for name, is_set in config.items() if is_set is True and prefix in name)
