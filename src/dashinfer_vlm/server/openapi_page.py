"""The page at `/docs`: the OpenAPI document for people, without scripts and without other hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

__all__ = ["page"]

Json = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8886; }
code, th[scope=row] { font-family: ui-monospace, monospace; font-weight: normal; }
section { scroll-margin-top: 1rem; }
"""


def page(document: Json) -> str:
    """Every operation, then every schema that they refer to."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return "".join(
        (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>',
            f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>',
            *_operations(document),
            "<h2>Schemas</h2>",
            *(_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items())),
            "</main></body></html>",
        )
    )


def _operations(document: Json) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
            yield _query(operation.get("parameters", []))
            if "requestBody" in operation:
                yield f"<p>Body: {_contents(operation['requestBody']['content'])}</p>"
            yield '<table><thead><tr><th scope="col">Status</th><th scope="col">Answer</th></tr></thead><tbody>'
            for status, response in operation["responses"].items():
                answer = f"{escape(response['description'])} {_contents(response.get('content', {}))}"
                yield f'<tr><th scope="row">{status}</th><td>{answer}</td></tr>'
            yield "</tbody></table></section>"


def _query(parameters: list[Json]) -> str:
    told = (f"<code>{escape(p['name'])}</code> {_type(p['schema'])}" for p in parameters if p["in"] == "query")
    line = ", ".join(told)
    return f"<p>Query: {line}</p>" if line else ""


def _contents(contents: Json) -> str:
    """Media types, each with the schema of what it holds."""
    return ", ".join(f"<code>{escape(kind)}</code> {_type(_held(content))}" for kind, content in contents.items())


def _held(content: Json) -> Json:
    """The schema of a body, or of the data of one event."""
    schema: Json = content["schema"] if "schema" in content else content["itemSchema"]["properties"]["data"]
    return schema


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f'<tr><th scope="row">{escape(field)}{" *" if field in required else ""}</th><td>{_type(told)}</td>'
        f"<td>{escape(told.get('description', ''))}</td></tr>"
        for field, told in schema.get("properties", {}).items()
    )
    about = escape(schema.get("description", ""))
    head = f'<section id="{escape(name)}"><h3><code>{escape(name)}</code></h3><p>{about}</p>'
    heads = "".join(f'<th scope="col">{word}</th>' for word in ("Field (* must be sent)", "Type", ""))
    return f"{head}<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></section>"


def _type(schema: Json) -> str:
    """In a few words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}</code></a>'
    if "contentSchema" in schema:
        return _type(schema["contentSchema"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_type, schema[key])))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    kind = schema.get("type", "anything")
    return escape(" or ".join(kind) if isinstance(kind, list) else kind)
