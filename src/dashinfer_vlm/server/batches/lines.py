"""The lines of batch files, in the format of OpenAI's Batch API: requests in, records of their answers out."""

from __future__ import annotations

import re
import secrets
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator

import msgspec

__all__ = [
    "BatchError",
    "BatchRecord",
    "BatchRequest",
    "BatchResponse",
    "Line",
    "encoded",
    "filled_lines",
    "line_number",
    "numbered_lines",
    "record_id",
]


_RECORD_ID = re.compile(r"batch_req_[0-9a-f]{24}([0-9a-f]{8,})")


class BatchRequest(msgspec.Struct, frozen=True):
    """One input line."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class BatchResponse(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, frozen=True):
    """Why a line is not a request."""

    code: str
    message: str


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One output line."""

    id: str
    custom_id: str | None
    response: BatchResponse | None = None
    error: BatchError | None = None

    @property
    def is_good(self) -> bool:
        return self.response is not None and self.response.status_code == 200


class _Streams(msgspec.Struct, frozen=True):
    stream: object = None


Line = tuple[int, BatchRequest | BatchRecord]
"""Its number, and the request in it; where it is none, the record that says why."""


def numbered_lines(file: Iterable[bytes], url: str | None = None) -> Iterator[Line]:
    """What the lines of a batch say; blank ones count, but say nothing. With `url`, all must be requests to it."""
    seen: set[str] = set()
    for number, line in filled_lines(file):
        parsed = _parse(number, line, seen)
        if url is not None and isinstance(parsed, BatchRequest) and parsed.url != url:
            parsed = _refused(number, parsed.custom_id, f"{parsed.url} is not {url}, the batch's endpoint")
        yield number, parsed


def filled_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines, without those that are blank, and without the byte order mark that some editors put in front
    of the first."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line


def encoded(record: BatchRecord) -> bytes:
    """A line of output."""
    return msgspec.json.encode(record) + b"\n"


def _parse(number: int, line: bytes, seen: set[str]) -> BatchRequest | BatchRecord:
    """The request in a line; `seen` has the custom ids so far, and gets this one."""
    try:
        request = msgspec.json.decode(line, type=BatchRequest)
        streams = msgspec.json.decode(request.body, type=_Streams).stream
    except msgspec.DecodeError as error:
        return _refused(number, None, f"this line is not a batch request: {error}")
    if request.custom_id in seen:
        return _refused(number, request.custom_id, "an earlier line has the same custom_id")
    seen.add(request.custom_id)
    if request.method != "POST" or not request.url.startswith("/v1/"):
        reason = f"{request.method} {request.url} is not a batch request; POST to /v1/chat/completions, for example"
        return _refused(number, request.custom_id, reason)
    if streams:
        return _refused(number, request.custom_id, "stream is set; answers of a batch are whole")
    return request


def _refused(number: int, custom_id: str | None, message: str) -> BatchRecord:
    return BatchRecord(id=record_id(number), custom_id=custom_id, error=BatchError("invalid_request", message))


def record_id(number: int) -> str:
    """Of the answer to a line of the input: no other has it, and `line_number` finds the line."""
    return f"batch_req_{secrets.token_hex(12)}{number:08x}"


def line_number(id: str) -> int | None:
    """The line that a record answers; None for an id that is no `record_id`."""
    match = _RECORD_ID.fullmatch(id)
    return int(match[1], 16) if match else None
