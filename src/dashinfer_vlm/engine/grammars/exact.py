"""Numbers of a schema that the library would keep otherwise than they are written: it reads all of them as floats."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

__all__ = ["refuse_inexact"]

_LARGEST = 2**53
"""Up to it a float holds every whole number."""
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""What holds schemas under names of the client's."""
_VALUES = frozenset({"default", "examples"})
"""What an answer is not held to."""


def refuse_inexact(schema: Any) -> None:
    """Raise ValueError for a whole number of `const` or `enum` beyond 2 ** 53: an answer would have another one."""
    number = next(_inexact(schema), None)
    if number is not None:
        raise ValueError(f"{number} in const or enum: whole numbers beyond 2^53 would be rounded; describe a string")


def _inexact(schema: Any) -> Iterator[int]:
    if isinstance(schema, list):
        yield from chain.from_iterable(map(_inexact, schema))
    for key, of in schema.items() if isinstance(schema, dict) else ():
        if key in ("const", "enum"):
            yield from _large(of)
        elif key in _BY_NAME and isinstance(of, dict):
            yield from _inexact(list(of.values()))
        elif key not in _VALUES:
            yield from _inexact(of)


def _large(value: Any) -> Iterator[int]:
    if isinstance(value, int) and abs(value) > _LARGEST:
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield from chain.from_iterable(map(_large, parts))
