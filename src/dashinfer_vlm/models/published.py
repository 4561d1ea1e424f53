"""What a checkpoint was published for beside answers: sentence-transformers' files say so, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.tokenizer_file import read_json

__all__ = ["HEAD", "Scoring", "read_scoring", "read_why_no_vectors"]

HEAD = "lm_head.weight"
_MODULES = "modules.json"
_LAST = "lasttoken"
_POOLING_MODE = "pooling_mode"
_SCORE_FOLDER = "1_LogitScore"
"""Where sentence-transformers write a LogitScore; Qwen3-VL-Reranker-8B has it there, too, and names another folder."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """A pair's score is the product of its last token's normed state with a row of a matrix, or with what one row has
    more than another: the logit of yes against no."""

    matrix: str
    yes: int
    no: int | None = None
    """None: the row alone is the difference already."""


class _Module(msgspec.Struct):
    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        """The class, without where it is defined."""
        return self.type.rpartition(".")[2]


def read_why_no_vectors(folder: Path) -> str | None:
    """None where `modules.json` has the model, then nothing but the pooling of its last token and a norm of length 1.
    Otherwise what is missing, or what is asked for that nothing here computes. Raises CheckpointError for a file that
    cannot be read.
    """
    modules = _read_modules(folder)
    if modules is None:
        return f"it has no {_MODULES} of sentence-transformers"
    for module in modules[1:]:  # the first one is the model itself, sometimes by a class of its publisher's
        if module.kind == "Pooling":
            mode = _pooling(read_json(folder / module.path / "config.json"))
            if mode != _LAST:
                return f"its pooling is {mode!r}, and {_LAST!r} is supported"
        elif module.kind != "Normalize":
            return f"its {_MODULES} names {module.kind}, which is not supported"
    return None


def read_scoring(folder: Path, vocab_size: int) -> Scoring | None:
    """By the head's rows of the two tokens that `modules.json` and the LogitScore behind the model name; None where
    they do not. Raises CheckpointError for a file that cannot be read, or a token that is none.
    """
    modules = _read_modules(folder) or []
    if [module.kind for module in modules[1:]] != ["LogitScore"]:
        return None
    path = folder / modules[1].path / "config.json"
    if not path.is_file():
        path = folder / _SCORE_FOLDER / "config.json"
    config = read_json(path)
    yes: Any = config.get("true_token_id")
    no: Any = config.get("false_token_id")
    if no is None:
        return None
    for id in (yes, no):
        if type(id) is not int or not 0 <= id < vocab_size:
            raise CheckpointError(f"{path} names token {id!r}; ids are from 0 to {vocab_size - 1}")
    return Scoring(HEAD, yes, no)


def _read_modules(folder: Path) -> list[_Module] | None:
    path = folder / _MODULES
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[_Module])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not a list of modules: {error}") from error


def _pooling(config: dict[str, Any]) -> str:
    """By its name, or by the one flag of many that is set."""
    if isinstance(named := config.get(_POOLING_MODE), str):
        return named
    prefix = f"{_POOLING_MODE}_"
    return "+".join(name.removeprefix(prefix) for name, is_set in config.items() if is_set is True and prefix in name)
