"""Config fields become command-line flags, environment names and a page of documentation; each fact stands once, at
its field in `config.py`.

`max_model_len` is the flag `--max-model-len` (`--max_model_len` alike), the variable `DASHINFER_MAX_MODEL_LEN` and a row
of `docs/flags.md`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import rich_click as click

from dashinfer_vlm.config import EngineConfig, MediaConfig, ServerConfig, flag
from dashinfer_vlm.errors import ConfigError

__all__ = ["ENV_PREFIX", "FACES", "Flag", "build", "check_variables", "flags_of", "options", "reference_page"]

ENV_PREFIX = "DASHINFER_"
FACES: tuple[type[Any], ...] = (EngineConfig, MediaConfig, ServerConfig)
"""The configs that the server is started from, in the order of the help."""

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])


def string_list(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """`a,b` or `["a", "b"]` as a tuple of strings, none of them empty.

    A list that names nothing is refused: an empty list of keys or hosts would mean "everybody".
    """
    if isinstance(value, tuple):
        return value
    items = _parse_json(value) if value.startswith("[") else value.split(",")
    if not all(isinstance(item, str) for item in items):
        raise click.BadParameter("a list of strings is wanted")
    named = tuple(item.strip() for item in items if item.strip())
    if not named:
        raise click.BadParameter("the list is empty; name something or leave the flag out")
    return named


def count_table(value: str) -> dict[str, int]:
    """`{"image": 16}` as a dictionary from names to counts."""
    table = _parse_json(value)
    if not isinstance(table, dict) or not all(type(count) is int for count in table.values()):
        raise click.BadParameter('a JSON object of whole numbers is wanted, such as {"image": 16}')
    return table


def settings_table(value: str) -> dict[str, str | int]:
    """`{"method": "ngram", "num_speculative_tokens": 4}` as a dictionary; its config checks the keys."""
    table = _parse_json(value)
    if not isinstance(table, dict):
        raise click.BadParameter("a JSON object is wanted")
    return table


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"{error.msg} at character {error.pos} of the JSON text") from error


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

    def option(self) -> Callable[[Command], Command]:
        """The click option; its default is the field's own."""
        values = get_args(self.type) if get_origin(self.type) is Literal else ()
        shown = ",".join(self.default) if isinstance(self.default, tuple) else self.default
        details: dict[str, Any] = {} if self.type is bool else {"type": _param_type(self.type), "metavar": self.metavar}
        return click.option(
            *self.spellings,
            self.field,
            default=self.default,
            help=f"{self.help} One of {', '.join(values)}." if values else self.help,
            envvar=self.envs,
            show_default=False if self.secret or shown in (None, "", False) else str(shown),
            **details,
        )

    @property
    def metavar(self) -> str:
        """What stands for a value of the flag in the help."""
        names: dict[Any, str] = {
            str: "TEXT",
            int: "COUNT",
            float: "NUMBER",
            tuple: "A,B",
            dict: "JSON",
            Literal: "NAME",
        }
        return names[get_origin(self.type) or self.type]


def flags_of(face: type[Any]) -> list[Flag]:
    """The flags of one config class, in the order of its fields."""
    hints = get_type_hints(face)
    return [
        Flag(
            field=field.name,
            type=_without_none(hints[field.name]),
            default=field.default,
            help=_help(field.metadata),
            aliases=field.metadata["aliases"],
            group=field.metadata["group"],
            secret=field.metadata["secret"],
        )
        for field in dataclasses.fields(face)
    ]


def options(*faces: type[Any], only: Collection[str] | None = None) -> Callable[[Command], Command]:
    """Decorate a click command with a flag per field of `faces`, or of those in `only`, grouped in its help as the
    fields are."""
    flags = [item for face in faces for item in flags_of(face) if only is None or item.field in only]

    def decorate(command: Command) -> Command:
        for group in reversed(dict.fromkeys(item.group for item in flags)):
            command = click.option_panel(group, options=[flag(f.field) for f in flags if f.group == group])(command)
        for item in reversed(flags):
            command = item.option()(command)
        return command

    return decorate


def check_variables(*faces: type[Any]) -> None:
    """Raise ConfigError for a variable that is set to nothing where a list is wanted: click takes it for unset, and an
    operator whose keys did not arrive would run an open server."""
    for item in (item for face in faces for item in flags_of(face)):
        for name in item.envs if get_origin(item.type) is tuple else ():
            if os.environ.get(name, "unset").strip() == "":
                raise ConfigError(f"{name} is set but empty; name something or unset it")


def build(face: type[Config], values: Mapping[str, Any]) -> Config:
    """The config of class `face` out of a command's parsed values."""
    return face(**{item.field: values[item.field] for item in flags_of(face)})


def reference_page() -> str:
    """`docs/flags.md`: every flag with its variable, its values, its default and its help."""
    rows = [
        "# Flags of `dashinfer_vlm_serve`",
        "",
        "Made from the fields of `src/dashinfer_vlm/config.py` by `make docs`. `-` and `_` are alike in flags; lists are",
        "comma separated or JSON; a flag on the command line wins over its variable.",
    ]
    group = ""
    for item in (item for face in FACES for item in flags_of(face)):
        if item.group != group:
            group = item.group
            rows += ["", f"## {group}", "", "| flag | variable | values | default | |", "|---|---|---|---|---|"]
        names = ", ".join(f"`{name}`" for name in item.spellings)
        rows.append(f"| {names} | `{item.env}` | {_values(item.type)} | {_default(item.default)} | {item.help} |")
    return "\n".join(rows) + "\n"


def _help(meta: Mapping[str, Any]) -> str:
    offered = ", ".join(str(value) for value in meta["only"])
    return f"{meta['help']} Offered today: {offered}." if offered else str(meta["help"])


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (kind,) = (arg for arg in get_args(hint) if arg is not type(None))
    return kind


def _param_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    converters: dict[Any, Callable[..., Any]] = {
        tuple[str, ...]: string_list,
        dict[str, int]: count_table,
        dict[str, str | int]: settings_table,
    }
    return converters.get(kind, kind)


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    names: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "", tuple: "list", dict: "JSON"}
    return names[get_origin(kind) or kind]


def _default(value: Any) -> str:
    if value in (None, "", ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"
