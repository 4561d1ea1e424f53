"""Flags as options of click commands, and the page of documentation about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from itertools import chain
from typing import Any, Literal, TypeVar, get_args, get_origin

import rich_click as click
from click.core import ParameterSource

from dashinfer_vlm.flags import FACES, Flag, flags_of
from dashinfer_vlm.option import flag

__all__ = ["options", "reference_page"]

Command = TypeVar("Command", bound=Callable[..., Any])


def string_list(value: str) -> tuple[str, ...]:
    """`a,b` or `["a", "b"]` as a tuple of strings, none of them empty.

    A list that names nothing is refused: an empty list of keys or hosts would mean "everybody".
    """
    items = _parse_json(value) if value.startswith("[") else value.split(",")
    if not all(isinstance(item, str) for item in items):
        raise click.BadParameter("a list of strings is wanted")
    named = tuple(item.strip() for item in items if item.strip())
    if not named:
        raise click.BadParameter("the list is empty; name something or leave the flag out")
    return named


class StringList(click.ParamType):  # type: ignore[type-arg]  # older versions of click take none
    """A flag that may stand several times, each with one name or more; its variable stands once, blanks and all."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return string_list(value)

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


def all_named(context: click.Context, option: click.Parameter, lists: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Those of all places where the flag stands."""
    return tuple(chain.from_iterable(lists))


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


def named(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """A text as it is, unless the command line has an empty one: that would silently be the same as none."""
    if value == "" and context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
        raise click.BadParameter("it is empty; name something or leave the flag out")
    return value


def options(*faces: type[Any], only: Collection[str] | None = None) -> Callable[[Command], Command]:
    """Decorate a click command with a flag per field of `faces`, or of those in `only`, grouped in its help as the
    fields are."""
    flags = [item for face in faces for item in flags_of(face) if only is None or item.field in only]

    def decorate(command: Command) -> Command:
        for group in reversed(dict.fromkeys(item.group for item in flags)):
            command = click.option_panel(group, options=[flag(f.field) for f in flags if f.group == group])(command)
        for item in reversed(flags):
            command = _option(item)(command)
        return command

    return decorate


def reference_page() -> str:
    """`docs/flags.md`: every flag with its variable, its values, its default and its help."""
    rows = [
        "# Flags of `dashinfer_vlm_serve`",
        "",
        "Made from the fields of `src/dashinfer_vlm/config.py` by `make docs`. `-` and `_` are alike in flags; lists",
        "are comma separated, JSON, or the flag several times; a flag on the command line wins over its variable.",
    ]
    group = ""
    for item in (item for face in FACES for item in flags_of(face)):
        if item.group != group:
            group = item.group
            rows += ["", f"## {group}", "", "| flag | variable | values | default | |", "|---|---|---|---|---|"]
        names = ", ".join(f"`{name}`" for name in item.spellings)
        rows.append(f"| {names} | `{item.env}` | {_values(item)} | {_default(item.default)} | {item.help} |")
    return "\n".join(rows) + "\n"


def _option(item: Flag) -> Callable[[Command], Command]:
    """The click option; its default is the field's own."""
    values = [str(value) for value in item.offered or (get_args(item.type) if get_origin(item.type) is Literal else ())]
    details: dict[str, Any] = {} if item.type is bool else {"type": _param_type(item), "metavar": _metavar(item)}
    callbacks: dict[Any, Callable[..., Any]] = {str: named, tuple[str, ...]: all_named}
    return click.option(
        *item.spellings,
        item.field,
        default=item.default,
        help=f"{item.help} One of {', '.join(values)}." if values else item.help,
        envvar=item.envs,
        multiple=item.type == tuple[str, ...],
        callback=callbacks.get(item.type),
        show_default=not item.secret and item.default is not False and item.default not in (None, "", ()),
        **details,
    )


def _metavar(item: Flag) -> str:
    """What stands for a value of the flag in the help."""
    names: dict[Any, str] = {
        str: "TEXT",
        int: "COUNT",
        float: "NUMBER",
        tuple: "A,B",
        dict: "JSON",
        Literal: "NAME",
    }
    return names[get_origin(item.type) or item.type]


def _param_type(item: Flag) -> Any:
    """Values of a flag with more names than it offers are the config's to refuse: click would offer all of them."""
    kind = item.type
    if get_origin(kind) is Literal:
        return click.STRING if item.offered else click.Choice(get_args(kind))
    converters: dict[Any, Callable[..., Any]] = {
        dict[str, int]: count_table,
        dict[str, str | int]: settings_table,
    }
    return StringList() if kind == tuple[str, ...] else converters.get(kind, kind)


def _values(item: Flag) -> str:
    kind = item.type
    if item.offered or get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in item.offered or get_args(kind))
    names: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "", tuple: "list", dict: "JSON"}
    return names[get_origin(kind) or kind]


def _default(value: Any) -> str:
    if value in (None, "", ()):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"
