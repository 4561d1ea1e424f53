"""The grammar of a tool's arguments where calls are XML, in the Lark that llguidance reads.

A value is text up to `</parameter>` if its schema says string, and else JSON. It is read with the schema alone to tell
its type by (`frontend/xml_calls`): where that allows several, a text is a string only if it fits no other. So whatever
would be read as something that the schema does not allow is refused here, or left out of the grammar.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from dashinfer_vlm.engine.grammars.alternatives import Schema, alternatives

__all__ = ["arguments_in_lark"]

_END = "\n</parameter>\n"
_END_PATTERN = r"\n<\/parameter>\n"
_ANY = r"(.|\n)*"
_READS_OTHERWISE = rf"~/({_ANY}[^\n])?<\/parameter>{_ANY}/ & ~/({_ANY}\n)?(<parameter=|<\/function>){_ANY}/"
"""What a text must not hold: it would end there."""
_NO_BRACKET = r"~/[ \t\r\n]*[\[{]" + _ANY + "/"
_MOST_LENGTH = 1000
"""Of a text that has a bound: the library counts each character in a state of its own, beside those of what a text must
not hold, and gives up at somewhat more."""
_NAMED = ("$defs", "definitions")
_TO_NAMED = tuple(f"#/{key}/" for key in _NAMED)
_COMBINING = frozenset({"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "const", "enum"})
_OF_SCALARS = frozenset(
    {"pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
_OF_OBJECTS = frozenset(
    {"patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"}
    | {"dependentRequired", "dependentSchemas", "dependencies"}
)


def arguments_in_lark(name: str, schema: Schema, whitespace: str) -> list[str]:
    """Rules whose names begin with `name`; the first one is of all arguments that `schema` describes. Raises ValueError
    for a schema that cannot be kept."""
    return _Rules(name, schema, whitespace).all()


class _Rules:
    def __init__(self, name: str, schema: Schema, whitespace: str) -> None:
        self._name, self._schema, self._whitespace = name, schema, whitespace
        self._rules: list[str] = []

    def all(self) -> list[str]:
        schema = self._schema
        kind = schema.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            raise ValueError(f"arguments are an object, and the schema has incompatible types: {kind!r}")
        _refuse(schema, _COMBINING | _OF_OBJECTS, "arguments")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise ValueError("properties is no object, or required no list")
        described = {**properties, **{key: True for key in required if key not in properties}}
        others = schema.get("additionalProperties", True)
        if not described and others is not False:
            parts = [f"({self._any_parameter(others)})*"]
        else:
            parts = [self._parameter(key, of) + ("" if key in required else "?") for key, of in described.items()]
        return [f"{self._name}: {' '.join(parts) or _json('')}", *self._rules]

    def _parameter(self, key: str, schema: object) -> str:
        if re.search(r"[>\n]", key) or not key:
            raise ValueError(f"the property {key!r} cannot be the name of a parameter")
        return self._rule(f"{_json(f'<parameter={key}>' + chr(10))} {self._value(key, schema)}")

    def _any_parameter(self, schema: object) -> str:
        return self._rule(rf'"<parameter=" /[^<>\n]+/ ">\n" {self._value("additionalProperties", schema)}')

    def _value(self, key: str, schema: object) -> str:
        """With the tag behind it."""
        leaves = alternatives(schema, self._schema)
        texts = [leaf for leaf in leaves if leaf.get("type", "string") == "string"]
        others = [leaf for leaf in leaves if leaf not in texts]
        if not texts:
            return self._as_json(schema)
        _check_union(schema, key)
        for leaf in texts:
            _refuse(leaf, _COMBINING - {"enum"}, key)
        structures = [leaf for leaf in others if leaf["type"] in ("array", "object")]
        scalars = [leaf for leaf in others if leaf not in structures and leaf["type"] != "null"]
        is_free = all(_is_bare(leaf) for leaf in texts)
        if not all(map(_is_bare, scalars)) or (not is_free and len(scalars) + len(structures) > 0):
            raise ValueError(f"{key}: a text and what is none cannot be told apart as this schema needs it")
        if is_free:
            free = self._text(_ANY, [_NO_BRACKET] if structures else [])
            return self._one_of([free, *map(self._as_json, structures)])
        nulls = [_json("null" + _END)] if len(texts) < len(leaves) else []
        return self._one_of([*(self._of_text(leaf, key) for leaf in texts), *nulls])

    def _of_text(self, leaf: Schema, key: str) -> str:
        if "enum" in leaf:
            text = "".join(leaf["enum"])
            if re.search(r"</parameter>|(^|\n)(<parameter=|</function>)", text):
                raise ValueError(f"{key}: {text!r} cannot be the value of a parameter")
            return _json(text + _END)
        least, most = leaf.get("minLength", 0), leaf.get("maxLength")
        if not isinstance(least, int) or not isinstance(most, int | None):
            raise ValueError(f"{key}: minLength and maxLength are whole numbers")
        if max(least, most or 0) > _MOST_LENGTH:
            raise ValueError(f"{key}: lengths of more than {_MOST_LENGTH} cannot be kept where calls are XML")
        length = f"/(.|\\n){{{least},{'' if most is None else most}}}{_END_PATTERN}/"
        return self._text(_pattern(leaf["pattern"]) if "pattern" in leaf else _ANY, [length])

    def _text(self, pattern: str, more: list[str]) -> str:
        terminals = " & ".join([f"/({pattern}){_END_PATTERN}/", _READS_OTHERWISE, *more])
        name = f"{self._name}_{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: {name.upper()}\n{name.upper()}: {terminals}")
        return name

    def _as_json(self, schema: object) -> str:
        with_blanks = {"x-guidance": {"whitespace_pattern": self._whitespace}, **self._document(schema)}
        return f"%json {_json(with_blanks)} {_json(_END)}"

    def _document(self, schema: object) -> dict[str, Any]:
        """A part of the arguments' schema by itself, in which references lead where they led."""
        described = dict(schema) if isinstance(schema, Mapping) else {}
        named = {key: self._schema[key] for key in _NAMED if key in self._schema}
        document = {**named, **described}
        if _moved(document, "") == document:
            return document
        whole = "arguments"
        while whole in document.get("$defs", {}):
            whole += "_"
        rest = {key: of for key, of in self._schema.items() if key not in _NAMED}
        document["$defs"] = {**document.get("$defs", {}), whole: rest}
        moved: dict[str, Any] = _moved(document, f"#/$defs/{whole}")
        return moved

    def _one_of(self, texts: list[str]) -> str:
        return texts[0] if len(texts) == 1 else f"({' | '.join(texts)})"

    def _rule(self, body: str) -> str:
        name = f"{self._name}_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name


def _moved(schema: Any, root: str) -> Any:
    """With references that begin at the root beginning at `root` instead, but for those to named schemas, which stand
    at the root of each part."""
    if isinstance(schema, list):
        return [_moved(of, root) for of in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: of if key in ("const", "enum") else _moved(of, root) for key, of in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#") and not target.startswith(_TO_NAMED):
        moved["$ref"] = root + target[1:]
    return moved


def _refuse(schema: Schema, keywords: frozenset[str], where: str) -> None:
    if found := sorted(schema.keys() & keywords):
        raise ValueError(f"{where}: {', '.join(found)} cannot be kept where calls are XML")


def _check_union(schema: object, key: str) -> None:
    """What stands beside a choice of schemas or values would not be kept."""
    if isinstance(schema, Mapping) and (choices := sorted(schema.keys() & _COMBINING)):
        _refuse(schema, (_COMBINING | _OF_SCALARS) - {choices[0]}, key)


def _is_bare(leaf: Schema) -> bool:
    """Any value of its type will do."""
    return not leaf.keys() & (_COMBINING | _OF_SCALARS)


def _pattern(pattern: str) -> str:
    """A regular expression that is looked for, as one of a whole text between slashes. Raises ValueError.

    An anchor at an end is taken for one of all its alternatives, which allows less.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"the pattern {pattern!r} cannot be read: {error}") from error
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends].replace("\n", r"\n")
    escaped = re.sub(r"\\.|/", lambda found: found[0] if len(found[0]) > 1 else r"\/", inner)
    return f"{'' if begins else _ANY}({escaped}){'' if ends else _ANY}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
