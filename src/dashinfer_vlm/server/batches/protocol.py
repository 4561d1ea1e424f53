"""Files and batches as OpenAI's clients send and read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from pydantic import ConfigDict, Field, ValidationError

from dashinfer_vlm.errors import InvalidRequestError
from dashinfer_vlm.frontend.schema import Body, explain
from dashinfer_vlm.server.batches.store import Batch, Fault, Kept, Status, StoredFile
from dashinfer_vlm.server.responses.replies import ResponseUsage

Form = TypeVar("Form", bound=Body)
T = TypeVar("T", bound=msgspec.Struct)

_HOUR_S, _MONTH_S = 3600, 30 * 24 * 3600


class ExpiryBody(Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=_HOUR_S, le=_MONTH_S)]


def _of_form(field: dict[str, Any]) -> dict[str, Any]:
    """A form has no null, and no default that says it."""
    options = [option for option in field.get("anyOf", ()) if option != {"type": "null"}]
    told = options[0] if len(options) == 1 else field
    return {key: value for key, value in told.items() if key != "default"}


def _with_file(schema: dict[str, Any]) -> None:
    schema["properties"] = {"file": {"type": "string", "contentMediaType": "application/octet-stream"}} | {
        name: _of_form(told) for name, told in schema["properties"].items()
    }
    schema["required"] = ["file", *schema["required"]]


class UploadForm(Body):
    """The form of `POST /v1/files`: the fields beside the file, which its description has too."""

    model_config = ConfigDict(json_schema_extra=_with_file)

    purpose: Literal["batch"]
    expires_after: ExpiryBody | None = None


class BatchBody(Body):
    """`POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    output_expires_after: ExpiryBody | None = None


class BatchQuery(Body):
    """`GET /v1/batches`."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class FileQuery(Body):
    """`GET /v1/files`."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class FileReply(msgspec.Struct, frozen=True):
    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"

    @classmethod
    def of(cls, file: StoredFile) -> FileReply:
        return cls(file.id, file.num_bytes, file.created_at, file.expires_at, file.filename, file.purpose)


class FileDeleted(msgspec.Struct, frozen=True):
    id: str
    deleted: bool = True
    object: str = "file"


class Counts(msgspec.Struct, frozen=True):
    total: int
    completed: int
    failed: int


class Faults(msgspec.Struct, frozen=True):
    data: list[Fault]
    object: str = "list"


class BatchReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    endpoint: str
    errors: Faults | None
    input_file_id: str
    completion_window: str = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None
    model: str | None
    usage: ResponseUsage
    """Of all answers so far."""
    object: str = "batch"

    @classmethod
    def of(cls, batch: Batch) -> BatchReply:
        same = {name: getattr(batch, name) for name in cls.__struct_fields__ if hasattr(batch, name)}
        same |= {"usage": ResponseUsage.of(batch.usage), "model": batch.model_name}
        if batch.is_open:  # the ids are known before the files are there
            same |= {"output_file_id": None, "error_file_id": None}
        return cls(
            **same,
            errors=None if batch.fault is None else Faults([batch.fault]),
            request_counts=Counts(batch.num_requests, batch.num_completed, batch.num_failed),
        )


class Page(msgspec.Struct, Generic[T], frozen=True):
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


def read_form(fields: dict[str, str]) -> UploadForm:
    """The fields as they stood in the form, nested ones as `expires_after[seconds]`. Raises InvalidRequestError."""
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        outer, bracket, inner = name.partition("[")
        if bracket:
            nested.setdefault(outer, {})[inner.removesuffix("]")] = value
        else:
            nested[name] = value
    return read_fields(UploadForm, nested)


def read_fields(model: type[Form], fields: Mapping[str, Any]) -> Form:
    """What stands in a query or in a form, where everything is text. Raises InvalidRequestError."""
    try:
        return model.model_validate_strings(fields)
    except ValidationError as error:
        raise explain(error) from None


def page(kept: Sequence[Kept], after: str | None, limit: int, reply: Callable[[Kept], T]) -> Page[T]:
    """`limit` of `kept`, those behind the one with the id `after`; raises InvalidRequestError where it is not there."""
    ids = [each.id for each in kept]
    if after is not None and after not in ids:
        raise InvalidRequestError(f"after is {after[:80]!r}, which is not on this list", param="after")
    begin = 0 if after is None else ids.index(after) + 1
    told = ids[begin : begin + limit]
    return Page(
        data=[reply(each) for each in kept[begin : begin + limit]],
        first_id=told[0] if told else None,
        last_id=told[-1] if told else None,
        has_more=begin + limit < len(ids),
    )
