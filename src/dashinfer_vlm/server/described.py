"""What a route says of itself for `/openapi.json`, beside the path and the methods that FastAPI knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel

from dashinfer_vlm.server.errors import ErrorBody

__all__ = ["GENERATING", "LOOKING", "READING", "Operation", "operation_of"]

LOOKING: tuple[int, ...] = (500, 503)
"""Statuses of errors that any route may answer with."""
READING: tuple[int, ...] = (400, 404, 408, 413, 429, 500, 503)
"""... any that reads a body, with the name of a model in it."""
GENERATING: tuple[int, ...] = (400, 404, 408, 413, 422, 429, 500, 502, 503, 504)
"""... any that may fetch media."""

_KEY = "operation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of the API."""

    summary: str
    reply: Any
    """What msgspec knows a schema of, or the media type of a text."""
    body: type[BaseModel] | None = None
    body_type: str = "application/json"
    example: Any = None
    """A body that is answered."""
    query: type[BaseModel] | None = None
    """What reads the parameters behind the path."""
    events: tuple[Any, ...] = ()
    """What each event is one of, where the answer may be a stream of them."""
    names_events: bool = False
    """Whether each event of a stream has its type as its name; where none has, `[DONE]` is the last one."""
    errors: tuple[int, ...] = LOOKING
    error: Any = ErrorBody

    @property
    def extra(self) -> dict[str, Any]:
        """To be given to the route as `openapi_extra`."""
        return {_KEY: self}


def operation_of(route: APIRoute) -> Operation | None:
    """What a route was declared with."""
    return (route.openapi_extra or {}).get(_KEY)
