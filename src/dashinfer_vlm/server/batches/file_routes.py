"""`/v1/files`: what batches read and write."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from dashinfer_vlm.frontend.tenants import current_tenant
from dashinfer_vlm.server.batches.form import FormReader
from dashinfer_vlm.server.batches.protocol import (
    FileDeleted,
    FileQuery,
    FileReply,
    Page,
    UploadForm,
    page,
    read_fields,
    read_form,
)
from dashinfer_vlm.server.batches.store import Store, StoredFile
from dashinfer_vlm.server.context import Context
from dashinfer_vlm.server.described import LOOKING, Operation
from dashinfer_vlm.server.status import json_response

_FORM_BYTES = 1 << 16
"""What a form may have beside its file."""

UPLOAD = Operation(
    summary="Take a file.",
    body=UploadForm,
    body_type="multipart/form-data",
    reply=FileReply,
    errors=(400, 408, 413, *LOOKING),
)
LIST_FILES = Operation(summary="The files of this key.", query=FileQuery, reply=Page[FileReply], errors=(400, *LOOKING))
FILE = Operation(summary="What is known of a file.", reply=FileReply, errors=(404, *LOOKING))
CONTENT = Operation(summary="What is in a file.", reply="application/octet-stream", errors=(404, *LOOKING))
DELETE = Operation(summary="Delete a file.", reply=FileDeleted, errors=(404, 409, *LOOKING))


def file_routes(context: Context, store: Store) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/files", openapi_extra=UPLOAD.extra)
    async def upload(request: Request) -> Response:
        id, path = store.new_upload()
        try:
            file = await _take(context, store, request, id, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return json_response(FileReply.of(file))

    @router.get("/v1/files", openapi_extra=LIST_FILES.extra)
    async def list_files(request: Request) -> Response:
        query = read_fields(FileQuery, dict(request.query_params))
        files = [file for file in store.files(_owner()) if query.purpose in (None, file.purpose)]
        if query.order == "asc":
            files.reverse()
        return json_response(page(files, query.after, query.limit, FileReply.of))

    @router.get("/v1/files/{id}", openapi_extra=FILE.extra)
    async def retrieve(id: str) -> Response:
        return json_response(FileReply.of(store.file(id, _owner())))

    @router.get("/v1/files/{id}/content", openapi_extra=CONTENT.extra)
    async def content(id: str) -> Response:
        file = store.file(id, _owner())
        headers = {"X-Content-Type-Options": "nosniff"}
        path = store.path(file)
        return FileResponse(path, headers=headers, media_type="application/octet-stream", filename=file.filename)

    @router.delete("/v1/files/{id}", openapi_extra=DELETE.extra)
    async def delete(id: str) -> Response:
        store.delete(store.file(id, _owner()))
        return json_response(FileDeleted(id))

    return router


def _owner() -> str:
    return current_tenant.get().id


async def _take(context: Context, store: Store, request: Request, id: str, path: Path) -> StoredFile:
    """Write the file of a form to `path` as it comes, counting its bytes before they are written."""
    form = FormReader(request.headers.get("content-type", ""))
    num_bytes = 0
    try:
        with path.open("wb") as file:
            most = store.limits.file_bytes + _FORM_BYTES
            async for chunk in context.bodies.arriving(request, most, "--max-file-mib"):
                if chunk and (news := form.feed(chunk)):
                    store.take(len(news))
                    num_bytes += len(news)
                    await asyncio.to_thread(file.write, news)
        form.finish()
        fields = read_form(form.fields)
    except BaseException:
        store.give(num_bytes)
        raise
    now = store.now()
    seconds = int(store.limits.seconds)
    if fields.expires_after is not None:
        seconds = min(seconds, fields.expires_after.seconds)
    kept = StoredFile(
        id=id,
        owner=_owner(),
        filename=form.filename or "upload.jsonl",
        purpose=fields.purpose,
        num_bytes=num_bytes,
        created_at=now,
        expires_at=now + seconds,
    )
    store.keep(kept)
    return kept
