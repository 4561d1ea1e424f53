"""A JSON schema taken apart into the types that its values may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_MOST_STEPS = 16
"""References and unions within each other; what is deeper may be anything."""
_OF_PYTHON = {bool: "boolean", dict: "object", float: "number", int: "integer", list: "array", str: "string"}


def alternatives(schema: object, root: Schema, steps: int = _MOST_STEPS) -> list[Schema]:
    """Schemas of one `type` each, in the order in which `schema` names them: one of them describes each of its values.

    Members of an enumeration are one each. One without a `type` is of a schema that says nothing of it. `root` is where
    references lead.
    """
    if not isinstance(schema, Mapping) or steps == 0:
        return [{}]
    if "$ref" in schema:
        return alternatives(_referred(schema["$ref"], root), root, steps - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        members = schema.get(key)
        if isinstance(members, list) and members and (key != "allOf" or len(members) == 1):
            return [leaf for member in members for leaf in alternatives(member, root, steps - 1)]
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return [{"type": _OF_PYTHON.get(type(value), "null"), "enum": [value]} for value in values]
    return [{**schema, "type": kind} if kind else schema for kind in _types(schema)]


def _types(schema: Schema) -> list[str]:
    kind = schema.get("type")
    if isinstance(kind, list):
        return [name for name in kind if isinstance(name, str)]
    implied = "object" if "properties" in schema else "array" if "items" in schema else ""
    return [kind if isinstance(kind, str) else implied]


def _referred(reference: object, root: Schema) -> object:
    """What `#/$defs/Name` names; None for what is elsewhere, or nowhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: object = root
    for step in reference[1:].split("/")[1:]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found
