"""Numbers of a schema that the library would keep otherwise than they are written: it reads all of them as floats, and
whole ones as 64 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

__all__ = ["kept_exactly"]

_LARGEST = 2**53
"""Up to it a float holds every whole number."""
_LEAST_BOUND, _MOST_BOUND = 1024 - 2**63, 2**63 - 1024
"""Floats between which every whole float has 64 bits, its negative, too."""
_VALUES = frozenset({"const", "enum", "multipleOf"})
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""What holds schemas under names of the client's."""
_NOT_HELD_TO = frozenset({"default", "examples"})
"""What an answer is not held to."""


def kept_exactly(schema: Any) -> Any:
    """The schema with bounds beyond 2 ** 53 moved inwards, to the next whole numbers that are kept as they are: what is
    written then is within the schema's own. Raises ValueError for other whole numbers beyond 2 ** 53, and where no
    number is left: an answer would be held to others."""
    if isinstance(schema, list):
        return [kept_exactly(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, of in schema.items():
        if key in _VALUES:
            _refuse_large(key, of)
            found[key] = of
        elif key in _BY_NAME and isinstance(of, dict):
            found[key] = {name: kept_exactly(x) for name, x in of.items()}
        else:
            found[key] = of if key in _NOT_HELD_TO else kept_exactly(of)
    _move_bounds(found)
    return found


def _move_bounds(schema: dict[str, Any]) -> None:
    bounds = [schema[key] for key in (*_LOWER, *_UPPER) if key in schema]
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds):
        return  # the library refuses it
    lower, upper = ([key for key in keys if _is_large(schema.get(key))] for keys in (_LOWER, _UPPER))
    if lower:
        least = max(_above(schema.pop(key) + key.startswith("exclusive")) for key in lower)
        schema["minimum"] = max(least, schema.get("minimum", least))
    if upper:
        most = min(-_above(-(schema.pop(key) - key.startswith("exclusive"))) for key in upper)
        schema["maximum"] = min(most, _MOST_BOUND, schema.get("maximum", most))
    if (lower or upper) and schema.get("minimum", _LEAST_BOUND) > min(schema.get("maximum", _MOST_BOUND), _MOST_BOUND):
        bound = f"{schema.get('minimum')} to {schema.get('maximum')}"
        raise ValueError(f"bounds beyond 2^53 leave no number that is kept exactly ({bound}); describe a string")


def _above(number: int) -> int:
    """The least whole float from `number` on."""
    if number <= _LEAST_BOUND:
        return _LEAST_BOUND
    near = float(min(number, 2**64))
    return int(near if int(near) >= number else math.nextafter(near, math.inf))


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= _LARGEST


def _refuse_large(key: str, value: Any) -> None:
    number = next((x for x in _whole_numbers(value) if abs(x) > _LARGEST), None)
    if number is not None:
        raise ValueError(f"{number} in {key}: whole numbers beyond 2^53 would be rounded; describe a string")


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield from chain.from_iterable(map(_whole_numbers, parts))
