"""The one table from exceptions to HTTP: every error of this server is OpenAI's error object, or Anthropic's on the
routes of its API, built here."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashinfer_vlm import errors
from dashinfer_vlm.frontend.service import shutting_down

logger = logging.getLogger(__name__)

_INVALID = "invalid_request_error"

_TABLE: tuple[tuple[type[errors.DashInferError], int, str, str], ...] = (
    # subclasses stand before their bases: the first row that fits counts
    (errors.ContextLengthError, 400, _INVALID, "context_length_exceeded"),
    (errors.UnsupportedError, 400, _INVALID, "unsupported"),
    (errors.MediaRefusedError, 422, _INVALID, "media_refused"),
    (errors.MediaTooLargeError, 422, _INVALID, "media_too_large"),
    (errors.MediaUnavailableError, 422, _INVALID, "media_unavailable"),
    (errors.MediaTimeoutError, 504, "upstream_error", "media_timeout"),
    (errors.MediaFetchError, 502, "upstream_error", "media_fetch_failed"),
    (errors.MediaError, 422, _INVALID, "invalid_media"),
    (errors.InvalidRequestError, 400, _INVALID, "invalid_value"),
    (errors.DeadlineError, 504, "timeout_error", "deadline_exceeded"),
    (errors.UnavailableError, 503, "overloaded_error", "overloaded"),
    (errors.RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.OverloadedError, 429, "overloaded_error", "overloaded"),
    (errors.EngineDeadError, 503, "server_error", "engine_dead"),
    (errors.EngineError, 500, "server_error", "engine_error"),
)

_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_CLIENT_GONE = 499
"""Nobody reads it but the access log; nginx's number for a client that left."""
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class HttpError(Exception):
    """A refusal that only HTTP knows: keys, model names, bodies."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str = _INVALID,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reply = ErrorReply(status, ErrorObject(message, type, param, code), dict(headers or {}))


class ErrorObject(msgspec.Struct, frozen=True):
    """What OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error."""

    error: ErrorObject


class AnthropicErrorObject(msgspec.Struct, frozen=True):
    """What Anthropic's clients read."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, frozen=True):
    """The body of an answer, or an event."""

    error: AnthropicErrorObject
    type: str = "error"


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error on its way out."""

    status: int
    error: ErrorObject
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_refusal(self) -> bool:
        """Whether a limit or a rule kept the request out, and no failure."""
        return self.status < HTTPStatus.INTERNAL_SERVER_ERROR or self.error.type == "overloaded_error"

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.error))

    def response(self, path: str) -> Response:
        """The answer to a request for `path`, in the form of the API that it belongs to."""
        status, body = self.status, self.body
        if path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/"):
            status, error = self.anthropic()
            body = msgspec.json.encode(error)
        return Response(body, status, dict(self.headers), "application/json")

    def anthropic(self) -> tuple[int, AnthropicError]:
        """Status and body in Anthropic's form, which has one status for all that is wrong with a request."""
        status = 529 if self.error.code == "overloaded" else 400 if self.status == 422 else self.status
        type = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else _INVALID)
        return status, AnthropicError(AnthropicErrorObject(type, self.error.message))


def reply_to(error: Exception) -> ErrorReply:
    """Status, body and headers for `error`. What nobody foresaw is logged and answered without its text."""
    if isinstance(error, HttpError):
        return error.reply
    for kind, status, type, code in _TABLE:
        if isinstance(error, kind):
            param = error.param if isinstance(error, errors.InvalidRequestError) else None
            headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, errors.OverloadedError) else {}
            return ErrorReply(status, ErrorObject(str(error), type, param, code), headers)
    return _unforeseen(error)


def install_error_handlers(app: FastAPI, refused: Callable[[str], None]) -> None:
    """Every way in which a request can fail ends in `reply_to`; `refused` hears why a request was not taken."""

    async def answer(request: Request, error: Exception) -> Response:
        reply = reply_to(error)
        if reply.is_refusal:
            refused(error.reason if isinstance(error, errors.OverloadedError) else str(reply.error.code))
        return reply.response(request.url.path)

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), error
        message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase}"
        code = _HTTP_CODES.get(error.status_code)
        reply = ErrorObject(message, _INVALID, None, code)
        return ErrorReply(error.status_code, reply, error.headers or {}).response(request.url.path)

    async def answer_nobody(_: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    app.add_middleware(Unforeseen)
    for kind in (errors.DashInferError, HttpError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    app.add_exception_handler(Exception, answer)


CUT_OFF = "the server ends"


class Unforeseen:
    """ASGI middleware. Answers what no handler is for; Starlette's own last resort answers too, but has the server log
    the same error again. Where the answer has begun, the server logs the error and ends the connection.

    A request whose task is cancelled with the message CUT_OFF is one that the end of the server has cut off; batches
    cancel theirs, and want no answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError as error:
            if error.args != (CUT_OFF,):
                raise
            if not begun:
                await reply_to(shutting_down()).response(scope["path"])(scope, receive, send)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await reply_to(error).response(scope["path"])(scope, receive, send)


def _unforeseen(error: Exception) -> ErrorReply:
    ticket = secrets.token_hex(4)
    logger.error("error %s", ticket, exc_info=error)
    message = f"internal server error; the server's log says more under {ticket}"
    return ErrorReply(500, ErrorObject(message, "server_error", None, "internal_error"))
