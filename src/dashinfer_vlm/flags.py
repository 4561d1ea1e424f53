"""Config fields as flags: their spellings and environment names, for the command line, the offline API and the docs;
each fact stands once, at its field in `config.py`.

`max_model_len` is the flag `--max-model-len` (`--max_model_len` alike), the variable `DASHINFER_MAX_MODEL_LEN` and a
row of `docs/flags.md`.
"""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.option import flag

__all__ = ["ENV_PREFIX", "FACES", "Flag", "build", "flags_of"]

ENV_PREFIX = "DASHINFER_"
FACES: tuple[type[Any], ...] = (EngineConfig, MediaConfig, ServerConfig)
"""The configs that the server is started from, in the order of the help."""

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Flag:
    """One field of a config as a flag."""

    field: str
    type: Any
    """The field's type without `| None`."""
    default: Any
    help: str
    aliases: tuple[str, ...]
    group: str
    secret: bool
    offered: tuple[Any, ...]
    """The values that work today, where not all do."""

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.field.upper()

    @property
    def envs(self) -> list[str]:
        """The variable of the field, then those of its aliases."""
        return [self.env, *(ENV_PREFIX + alias.upper().replace("-", "_") for alias in self.aliases)]

    @property
    def spellings(self) -> list[str]:
        """What click declares the flag by; `token_normalize_func` of the command makes `_` and `-` alike."""
        name = flag(self.field)
        first = f"{name}/--no-{name[2:]}" if self.type is bool else name
        return [first, *(f"--{alias}" for alias in self.aliases)]


def flags_of(face: type[Any]) -> list[Flag]:
    """The flags of one config class, in the order of its fields."""
    hints = get_type_hints(face)
    return [
        Flag(
            field=field.name,
            type=_without_none(hints[field.name]),
            default=field.default,
            help=field.metadata["help"],
            aliases=field.metadata["aliases"],
            group=field.metadata["group"],
            secret=field.metadata["secret"],
            offered=field.metadata["only"],
        )
        for field in dataclasses.fields(face)
    ]


def build(face: type[Config], values: Mapping[str, Any]) -> Config:
    """The config of class `face` out of a command's parsed values, some of which came from variables; raises
    ConfigError for a variable that is set to nothing."""
    _check_variables(face)
    return face(**{item.field: values[item.field] for item in flags_of(face)})


def _check_variables(face: type[Any]) -> None:
    """Raise ConfigError for a variable that is set to nothing where a text or a list is wanted: click takes it for
    unset, and an operator whose keys did not arrive would run an open server."""
    for item in flags_of(face):
        for name in item.envs if item.type is str or get_origin(item.type) is tuple else ():
            if os.environ.get(name, "unset").strip() == "":
                raise ConfigError(f"{name} is set but empty; name something or unset it")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (kind,) = (arg for arg in get_args(hint) if arg is not type(None))
    return kind
