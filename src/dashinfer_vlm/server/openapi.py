"""`GET /openapi.json` and `GET /docs`: the API as the models that read requests and write answers have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

import dashinfer_vlm
from dashinfer_vlm.server.described import Operation, operation_of
from dashinfer_vlm.server.openapi_page import page
from dashinfer_vlm.server.origins import SAFE_METHODS

__all__ = ["document", "document_routes"]

Json = dict[str, Any]

_REF = "#/components/schemas/{}"
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_KEYS: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
"""Where a request may have its key: in one of these."""
_IN_BRACKETS: Json = {"style": "deepObject", "explode": True}
"""How a form has the fields of an object: `name[field]`."""
_PHRASES = {529: "Overloaded"}
"""Of statuses that only one API has."""
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def document_routes(routes: Iterable[APIRoute], *, with_keys: bool) -> APIRouter:
    """Describe `routes`; `with_keys`: they want a key. Worked out when first asked for, and then kept."""
    router = APIRouter(include_in_schema=False)
    described = tuple(routes)

    @cache
    def whole() -> Json:
        return document(described, with_keys=with_keys)

    @router.get("/openapi.json")
    def openapi() -> Response:
        return Response(msgspec.json.encode(whole()), media_type="application/json")

    @router.get("/docs")
    def docs() -> Response:
        headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page(whole()), media_type="text/html; charset=utf-8", headers=headers)

    return router


def document(routes: Iterable[APIRoute], *, with_keys: bool) -> Json:
    """OpenAPI 3.2, the first that can tell of streams of events, of those routes that say what they are."""
    operations = [(route, operation) for route in routes if (operation := operation_of(route)) is not None]
    schemas = _Schemas([operation for _, operation in operations])
    paths: dict[str, Json] = {}
    for route, operation in operations:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in sorted(route.methods or ()):
            told = _operation(route, method, operation, schemas, with_keys=with_keys)
            paths.setdefault(path, {})[method.lower()] = told
    components: Json = {"schemas": schemas.components}
    if with_keys:
        components["securitySchemes"] = _KEYS
    return {
        "openapi": "3.2.0",
        "info": {"title": "DashInfer-VLM", "version": dashinfer_vlm.__version__},
        "paths": paths,
        "components": components,
    }


class _Schemas:
    """References to the schemas of all operations, and what they refer to."""

    def __init__(self, operations: list[Operation]) -> None:
        bodies = list({operation.body: None for operation in operations if operation.body is not None})
        asked: list[tuple[type[BaseModel], Literal["validation"]]] = [(body, "validation") for body in bodies]
        by_body, definitions = models_json_schema(asked, ref_template=_REF.format("{model}"))
        self._bodies = {body: by_body[body, "validation"] for body in bodies}
        replies = list(dict.fromkeys(r for o in operations for r in (o.reply, *o.events, o.error) if not _is_text(r)))
        told, components = msgspec.json.schema_components(replies, ref_template=_REF.format("{name}"))
        self._replies: dict[Any, Json] = dict(zip(replies, told, strict=True))
        self.components = {**definitions.get("$defs", {}), **components}

    def of_body(self, body: type[BaseModel]) -> Json:
        return self._bodies[body]

    def of_reply(self, reply: Any) -> Json:
        return self._replies[reply]


def _is_text(reply: Any) -> bool:
    """What has no schema but a media type, or is not there."""
    return reply is None or isinstance(reply, str)


def _operation(route: APIRoute, method: str, operation: Operation, schemas: _Schemas, *, with_keys: bool) -> Json:
    told: Json = {
        "operationId": f"{method.lower()}_{route.name}",
        "summary": operation.summary,
        "responses": dict(_responses(operation, schemas, method, with_keys=with_keys)),
    }
    if parameters := [*_path_parameters(route.path), *_query_parameters(operation.query)]:
        told["parameters"] = parameters
    if operation.body is not None:
        told["requestBody"] = {"required": True, "content": {operation.body_type: _body(operation, schemas)}}
    if with_keys:
        told["security"] = [{name: []} for name in _KEYS]
    return told


def _body(operation: Operation, schemas: _Schemas) -> Json:
    assert operation.body is not None, operation
    told: Json = {"schema": schemas.of_body(operation.body)}
    if operation.example is not None:
        told["example"] = operation.example
    if operation.body_type == "multipart/form-data":
        fields = operation.body.model_json_schema()["properties"]
        told["encoding"] = {name: _IN_BRACKETS for name, field in fields.items() if "$ref" in field}
    return told


def _path_parameters(path: str) -> Iterator[Json]:
    for name in _PARAMETER.findall(path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(query: type[BaseModel] | None) -> Iterator[Json]:
    fields = query.model_json_schema()["properties"] if query is not None else {}
    for name, schema in fields.items():
        if (told := _without_null(schema)).get("enum") != []:  # there is a value that may be sent
            yield {"name": name, "in": "query", "required": False, "schema": told}


def _without_null(schema: Json) -> Json:
    """What the text of a query can say of a field that may be null elsewhere."""
    told = {key: value for key, value in schema.items() if (key, value) != ("default", None)}
    if "enum" in told:
        told["enum"] = [value for value in told["enum"] if value is not None]
    options = [option for option in told.pop("anyOf", []) if option != {"type": "null"}]
    if len(options) > 1:
        return {**told, "anyOf": options}
    return {**told, **(options[0] if options else {})}


def _responses(operation: Operation, schemas: _Schemas, method: str, *, with_keys: bool) -> Iterator[tuple[str, Json]]:
    reply = operation.reply
    has_content = method != "HEAD"
    content: Json = (
        {reply: {"schema": {"type": "string"}}}
        if isinstance(reply, str)
        else {"application/json": {"schema": schemas.of_reply(reply)}}
    )
    if operation.events:
        content["text/event-stream"] = {"itemSchema": _event(operation, schemas)}
    yield "200", {"description": "OK", **({"content": content} if has_content else {})}
    error: Json = (
        {"content": {"application/json": {"schema": schemas.of_reply(operation.error)}}} if has_content else {}
    )
    not_let_in = {401} if with_keys else set() if method in SAFE_METHODS else {403}
    for status in sorted({*operation.errors, *not_let_in}):
        yield str(status), {"description": _PHRASES.get(status) or HTTPStatus(status).phrase, **error}


def _event(operation: Operation, schemas: _Schemas) -> Json:
    """The fields of one event of a stream, as OpenAPI has them: the data is a text, of which is told what it holds."""
    kinds = [schemas.of_reply(event) for event in operation.events]
    holds = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    data: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": holds}
    if operation.names_events:
        return {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": data},
            "required": ["event", "data"],
        }
    return {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}, "required": ["data"]}
