"""A field of a config that is a flag too: what is told of it, and what its value may be."""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from dashinfer_vlm.errors import ConfigError

__all__ = ["check_fields", "flag", "option"]


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    group: str = "Engine",
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    only: tuple[Any, ...] = (),
) -> Any:
    """A config field that is also a command-line flag.

    `aliases` are further spellings of the flag, `least` and `most` the range of a number. `only` lists the values that
    work today, for a documented flag whose other values are not offered yet.
    """
    described = {"help": help, "aliases": aliases, "group": group, "secret": secret}
    return field(default=default, metadata={**described, "least": least, "most": most, "only": only})


def flag(field_name: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + field_name.replace("_", "-")


def check_fields(config: Any) -> None:
    """Raise ConfigError for the first value that is not of its field's type, or not within its bounds."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        _check_type(item, hints[item.name], value)
        if value is not None:
            _check_bounds(item, value)


def _check_type(item: Field[Any], hint: Any, value: Any) -> None:
    """A caller from Python may pass anything; a value of a secret is not told."""
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        told = "" if item.metadata["secret"] else f" is {value!r}"
        choices = item.metadata["only"] or (get_args(hint) if get_origin(hint) is Literal else ())
        wanted = f"it must be one of {', '.join(map(str, choices))}" if choices else str(error)
        raise ConfigError(f"{flag(item.name)}{told}: {wanted}") from error


def _check_bounds(item: Field[Any], value: Any) -> None:
    least, most, only = (item.metadata[name] for name in ("least", "most", "only"))
    if least is not None and not value >= least:  # also false for NaN
        raise ConfigError(f"{flag(item.name)} is {value}; it must be at least {least}")
    if most is not None and not value <= most:
        raise ConfigError(f"{flag(item.name)} is {value}; it must be at most {most}")
    if only and value not in only:
        offered = " or ".join(str(v) for v in only)
        raise ConfigError(f"{flag(item.name)} {value} is not offered yet; this version supports {offered}")
