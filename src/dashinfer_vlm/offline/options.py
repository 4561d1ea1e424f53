"""Options of the offline API: the fields of the configs, by any name that their flags have."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from dashinfer_vlm.config import EngineConfig, MediaConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.flags import flags_of

Config = TypeVar("Config")


def configs(options: Mapping[str, Any]) -> tuple[EngineConfig, MediaConfig]:
    """Both configs, validated, from options by the name of a field or by another name of its flag; a path may be an
    object."""
    flags = [*flags_of(EngineConfig), *flags_of(MediaConfig)]
    names = {name.replace("-", "_"): flag.field for flag in flags for name in (flag.field, *flag.aliases)}
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "; docs/flags.md has the list"
            raise ConfigError(f"there is no option {name!r}{hint}")
    values = {names[k]: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    engine, media = _config(EngineConfig, values), _config(MediaConfig, values)
    engine.validate()
    media.validate()
    return engine, media


def _config(face: type[Config], values: Mapping[str, Any]) -> Config:
    return face(**{flag.field: values[flag.field] for flag in flags_of(face) if flag.field in values})
