"""Reading a request: its body within limits, and whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dashinfer_vlm.frontend.schema import explain
from dashinfer_vlm.server.reading import BodyReader

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")


async def read_body(request: Request, model: type[Model], reader: BodyReader) -> Model:
    """Read and check the JSON body; raises InvalidRequestError, or what `reader` raises."""
    body = await reader.read(request)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


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
