"""Files through the OpenAI client, and what bounds them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.server.batches.store import Store, StoredFile, StoreLimits
from tests.server.batches.conftest import Keep

Client = Callable[..., AsyncOpenAI]
LIMITS = StoreLimits(file_bytes=100, total_bytes=1000, num_files=10, seconds=60)


async def test_a_file_is_kept_listed_read_and_deleted(keep: Keep, openai_client: Client, tmp_path: Path) -> None:
    files = openai_client(await keep()).files
    content = b"{}\n" * 100_000
    kept = await files.create(file=("requests.jsonl", content), purpose="batch")
    assert (kept.filename, kept.bytes, kept.purpose, kept.object) == ("requests.jsonl", 300_000, "batch", "file")
    assert kept.expires_at is not None
    assert abs(kept.expires_at - kept.created_at - 30 * 24 * 3600) < 2
    assert await files.retrieve(kept.id) == kept
    assert [file async for file in files.list()] == [kept]
    assert (await files.content(kept.id)).content == content
    assert (await files.delete(kept.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await files.retrieve(kept.id)
    assert not list((tmp_path / "kept" / "files").iterdir())


async def test_lists_come_in_pages_and_in_either_order(keep: Keep, openai_client: Client) -> None:
    files = openai_client(await keep()).files
    ids = {(await files.create(file=(f"{i}", b"x"), purpose="batch")).id for i in range(5)}
    newest = [file.id async for file in files.list(limit=2)]
    assert len(newest) == 5
    assert set(newest) == ids
    assert [file.id async for file in files.list(limit=2, order="asc")] == newest[::-1]
    assert [file async for file in files.list(purpose="batch_output")] == []
    with pytest.raises(openai.BadRequestError, match="not on this list"):
        await files.list(after="file-0")


async def test_the_next_server_has_the_files_of_the_one_before(keep: Keep, openai_client: Client) -> None:
    before = await keep()
    kept = await openai_client(before).files.create(file=("a", b"content"), purpose="batch")
    before.server.should_exit = True
    await before.server.ended.wait()
    files = openai_client(await keep()).files
    assert (await files.content(kept.id)).content == b"content"


async def test_nobody_sees_the_files_of_another_key(keep: Keep, openai_client: Client) -> None:
    running = await keep(api_keys=("mine", "yours"))
    kept = await openai_client(running, "mine").files.create(file=("a", b"x"), purpose="batch")
    yours = openai_client(running, "yours").files
    assert [file async for file in yours.list()] == []
    for ask in (yours.retrieve, yours.content, yours.delete):
        with pytest.raises(openai.NotFoundError):
            await ask(kept.id)
    assert await openai_client(running, "mine").files.retrieve(kept.id) == kept


async def test_limits_of_size_room_and_number_are_kept(keep: Keep, openai_client: Client, tmp_path: Path) -> None:
    running = await keep(max_file_mib=1, files_gib=1.5 / 1024, max_files=2)
    files = openai_client(running).files
    for size, told in (
        (3 << 20, "--max-file-mib"),
        (1 << 20, None),
        (1 << 20, "--files-gib"),
        (9, None),
        (9, "--max-f"),
    ):
        if told is None:
            await files.create(file=("a", b"x" * size), purpose="batch")
            continue
        with pytest.raises(openai.APIStatusError, match=told) as refused:
            await files.create(file=("a", b"x" * size), purpose="batch")
        assert refused.value.status_code == 413
    assert sum(path.stat().st_size for path in (tmp_path / "kept" / "files").glob("file-*[0-9a-f]")) == (1 << 20) + 9


async def test_a_file_may_be_kept_for_a_shorter_time(keep: Keep, openai_client: Client) -> None:
    files = openai_client(await keep()).files
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    kept = await files.create(file=("a", b"x"), purpose="batch", expires_after=expiry)
    assert kept.expires_at == kept.created_at + 3600


@pytest.mark.parametrize(
    ("fields", "files", "told"),
    [
        ({"purpose": "fine-tune"}, {"file": ("a", b"x")}, "purpose"),
        ({}, {"file": ("a", b"x")}, "purpose is missing"),
        ({"purpose": "batch"}, {"data": ("a", b"x")}, "file is missing"),
        ({"purpose": "batch", "nonsense": "1"}, {"file": ("a", b"x")}, "nonsense is not a field"),
        ({"purpose": "batch", "expires_after[seconds]": "5"}, {"file": ("a", b"x")}, "expires_after.anchor is"),
        ({"purpose": "batch", "expires_after": "5"}, {"file": ("a", b"x")}, "expires_after: input should be an object"),
        ({"purpose": "x" * 5000}, {"file": ("a", b"x")}, "purpose has more than 1024 bytes"),
        ({str(i): "x" for i in range(17)}, {"file": ("a", b"x")}, "more than 16 fields"),
    ],
)
async def test_a_form_that_cannot_be_meant_is_refused(keep: Keep, fields: Any, files: Any, told: str) -> None:
    running = await keep()
    reply = await running.post("/v1/files", data=fields, files=files)
    assert (reply.status_code, told in reply.json()["error"]["message"]) == (400, True), reply.text


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        ("application/json", b"{}", "multipart/form-data"),
        ("multipart/form-data", b"{}", "multipart/form-data"),
        ("multipart/form-data; boundary=b", b"nonsense", "cannot be read"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx',
            "breaks off",
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nContent[Disposition: x\r\n\r\nx", "cannot be read"),
    ],
)
async def test_what_is_no_form_is_refused_and_not_logged(
    keep: Keep, kind: str, body: bytes, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = await keep()
    reply = await running.post("/v1/files", content=body, headers={"content-type": kind})
    assert (reply.status_code, told in reply.json()["error"]["message"]) == (400, True), reply.text
    assert not list((tmp_path / "kept" / "files").iterdir())
    assert not [record for record in caplog.records if record.levelname != "INFO"]


async def test_the_description_of_the_api_has_them(keep: Keep) -> None:
    document = (await (await keep()).get("/openapi.json")).json()
    told = {"/v1/files", "/v1/files/{id}", "/v1/files/{id}/content", "/v1/batches", "/v1/batches/{id}"}
    assert told | {"/v1/batches/{id}/cancel"} <= document["paths"].keys()
    for name in re.findall(r"#/components/schemas/([\w.]+)", json.dumps(document)):
        assert name in document["components"]["schemas"]


def test_without_a_folder_there_are_none(shared: httpx.Client) -> None:
    for path in ("/v1/files", "/v1/files/file-1", "/v1/batches"):
        reply = shared.get(path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_served")
        assert "--files-path" in reply.json()["error"]["message"]


def test_two_servers_cannot_share_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path, LIMITS)
    with pytest.raises(ConfigError, match="another server"):
        Store(tmp_path, LIMITS)
    store.close()
    Store(tmp_path, LIMITS).close()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(tmp_path / "file", LIMITS)


def test_what_is_too_old_goes_and_so_does_what_was_not_finished(tmp_path: Path) -> None:
    now = time.time()
    store = Store(tmp_path, LIMITS, clock=lambda: now)
    id, path = store.new_upload()
    path.write_bytes(b"half")
    store.close()
    store = Store(tmp_path, LIMITS, clock=lambda: now)
    assert not path.exists()
    id, path = store.new_upload()
    path.write_bytes(b"whole")
    store.take(5)
    file = StoredFile(
        id=id, owner="", filename="a", purpose="batch", num_bytes=5, created_at=int(now), expires_at=int(now) + 60
    )
    store.keep(file)
    assert store.files("") == [file]
    now += 61
    assert store.files("") == []
    assert not path.exists()
    store.take(LIMITS.total_bytes)
    store.close()


async def test_with_files_kept_no_route_says_that_they_are_not(keep: Keep) -> None:
    running = await keep()
    for path in ("/v1/files/x/y", "/v1/batches/x/y"):
        reply = await running.get(path)
        assert (reply.status_code, "--files-path" in reply.text) == (404, False)
