"""Reading a request: its body within limits, and whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError
from dashinfer_vlm.server.errors import HttpError
from dashinfer_vlm.server.schema import PART_TYPES, UNSUPPORTED

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")

_MAX_DISCARDED_BYTES = 2**30
"""A client that is told 413 only hears it once its body has been taken; beyond this it is cut off."""


async def read_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """Read and check the JSON body; raises InvalidRequestError, or HttpError 413 above `max_bytes`."""
    body = bytearray()
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes <= max_bytes:
            body += chunk
        else:
            body.clear()
        if num_bytes > _MAX_DISCARDED_BYTES + max_bytes:
            break
    if num_bytes > max_bytes:
        raise HttpError(413, "body_too_large", f"the body has more than {max_bytes} bytes, the limit; send less")
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _explain(error) from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], discard: Callable[[T], None]) -> T:
    """The result of `work`, which is cancelled when the client leaves first; ClientDisconnect is raised then.

    A result that comes when nobody wants it any more goes to `discard`.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    except BaseException:
        task.cancel()
        task.add_done_callback(lambda task: _discard(task, discard))
        raise
    finally:
        watch.cancel()


def _discard(task: asyncio.Future[T], discard: Callable[[T], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        discard(task.result())


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _explain(error: ValidationError) -> InvalidRequestError:
    """The first finding in the words of the API: the field's path, what is wrong, and what was sent if it is short."""
    finding = error.errors(include_url=False, include_context=False)[0]
    kind, where = finding["type"], _path(finding["loc"])
    if kind == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {finding['msg'].removeprefix('Invalid JSON: ')}")
    if kind == UNSUPPORTED:
        return UnsupportedError(f"{where} {finding['msg']}", param=where)
    if kind == "extra_forbidden":
        return UnsupportedError(f"{where} is not a field that this server knows", param=where)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_union(where, finding["input"])
    if kind == "missing":
        return InvalidRequestError(f"{where} is missing", param=where)
    sent = repr(finding["input"])
    value = f" (it is {sent})" if len(sent) <= 80 else ""
    return InvalidRequestError(f"{where or 'the body'}: {finding['msg'].lower()}{value}", param=where or None)


def _explain_union(where: str, value: Any) -> InvalidRequestError:
    if isinstance(value, dict) and "type" in value:
        message = f"{where} has type {str(value['type'])[:80]!r}; supported are {', '.join(PART_TYPES)}"
        return UnsupportedError(message, param=f"{where}.type")
    return InvalidRequestError(f"{where} has the wrong type, {type(value).__name__}", param=where)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].image_url.url`; tags of union members (`:text`) and of keys (`[key]`) are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith((":", "[")):
            path += f".{step}" if path else step
    return path
