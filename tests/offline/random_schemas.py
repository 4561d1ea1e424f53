"""Random JSON schemas of the kind that people write: nested, with bounds, choices, references and free fields.

Made of hypothesis's own parts: hypothesis-jsonschema 0.23 does not draw objects with the hypothesis of today.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
_SCALARS: list[Schema] = [
    {"type": "string"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "integer"},
    {"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5},
    {"type": "number"},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["integer", "null"]},
    {"$ref": "#/$defs/point"},
]
_small = st.integers(0, 3)
_names = st.text("abcdefgé _", min_size=1, max_size=6)
_values = (
    st.none() | st.booleans() | st.integers(-999, 999) | st.text(max_size=8) | st.lists(st.integers(0, 9), max_size=2)
)


def _flat() -> st.SearchStrategy[Schema]:
    between = st.tuples(st.integers(-50, 50), st.integers(0, 50))
    return st.one_of(
        st.sampled_from(_SCALARS),
        st.lists(_values, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        _values.map(lambda value: {"const": value}),
        st.tuples(_small, _small).map(lambda n: {"type": "string", "minLength": n[0], "maxLength": sum(n)}),
        between.map(lambda n: {"type": "integer", "minimum": n[0], "maximum": sum(n)}),
    )


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_names, inner, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    schema = {"type": "object", "properties": properties, "required": required}
    free = draw(st.none() | st.booleans() | inner)
    return schema if free is None else {**schema, "additionalProperties": free}


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    least, more = draw(_small), draw(_small)
    schema = {"type": "array", "minItems": least, "maxItems": least + more}
    first = draw(st.lists(inner, max_size=2))
    return {**schema, **({"prefixItems": first} if first else {}), "items": draw(inner)}


def _nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members})
    return st.one_of(_objects(inner), _arrays(inner), unions)


def schemas() -> st.SearchStrategy[Schema]:
    """Whole ones, with the definition that they may refer to; at least one level deep."""
    parts = st.recursive(_flat(), _nested, max_leaves=6)
    return _nested(parts).map(lambda schema: {**schema, "$defs": {"point": _POINT}})
