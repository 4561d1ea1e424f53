"""Batches through the OpenAI client: every line is answered once, and a restart changes nothing but the time."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai import AsyncOpenAI

from dashinfer_vlm.errors import OverloadedError
from dashinfer_vlm.frontend.deltas import Usage
from dashinfer_vlm.server.batches import batch_routes, worker
from dashinfer_vlm.server.batches.ends import BatchInput
from dashinfer_vlm.server.batches.lines import line_number
from dashinfer_vlm.server.batches.store import Batch
from dashinfer_vlm.server.batches.usage import plus, usage_of
from tests.server.batches.conftest import CHAT, Keep, jsonl, line, records
from tests.server.conftest import Running

Client = Callable[..., AsyncOpenAI]


async def made(client: AsyncOpenAI, content: bytes, **options: Any) -> Any:
    file = await client.files.create(file=("requests.jsonl", content), purpose="batch")
    asked: Any = {"endpoint": CHAT, "completion_window": "24h", **options}
    return await client.batches.create(input_file_id=file.id, **asked)


async def ended(client: AsyncOpenAI, id: str, *statuses: str) -> Any:
    """The batch, once it has ended (or has one of the statuses)."""
    while True:
        batch = await client.batches.retrieve(id)
        if batch.status in (statuses or ("completed", "failed", "expired", "cancelled")):
            return batch
        await asyncio.sleep(0.01)


async def until(is_so: Callable[[], bool]) -> None:
    while True:
        if is_so():
            return
        await asyncio.sleep(0.01)


async def answered(client: AsyncOpenAI, id: str, least: int) -> None:
    while True:
        if (await client.batches.retrieve(id)).request_counts.completed >= least:  # type: ignore[union-attr]
            return
        await asyncio.sleep(0.01)


async def stop(running: Running) -> None:
    running.server.should_exit = True
    await running.server.ended.wait()


def change(folder: Path, id: str, **changes: Any) -> None:
    """What a server finds that starts later."""
    path = folder / "kept" / "batches" / f"{id}.json"
    batch = msgspec.json.decode(path.read_bytes(), type=Batch)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(batch, **changes)))


async def test_every_line_is_answered(keep: Keep, openai_client: Client) -> None:
    client = openai_client(await keep("hello", served_model_name=("seen", "also")))
    other = line("d", url="/v1/completions")
    batch = await made(client, jsonl(line("a"), line("b"), line("c", n=0), other, b"{"), metadata={"for": "me"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
    batch = await ended(client, batch.id)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"for": "me"}, None)
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 2, "failed": 3}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    answers = records((await client.files.content(batch.output_file_id)).content)
    assert set(answers) == {"a", "b"}
    assert answers["a"]["response"]["status_code"] == 200
    assert answers["a"]["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    errors = records((await client.files.content(batch.error_file_id)).content)
    assert errors["c"]["response"]["body"]["error"]["param"] == "n"
    assert "the batch's endpoint" in errors["d"]["error"]["message"]
    assert line_number(errors[None]["id"]) == 5
    told = [answer["response"]["body"]["usage"] for answer in answers.values()]
    assert batch.usage.total_tokens == sum(usage["total_tokens"] for usage in told) > 0
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in told)
    assert batch.model == (await client.models.list()).data[0].id == "seen"
    kept = await client.files.retrieve(batch.output_file_id)
    assert (kept.purpose, kept.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert [each.id async for each in client.batches.list(limit=1)] == [batch.id]


@pytest.mark.parametrize(
    "answer",
    [
        {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
        {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 2},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    ],
)
def test_what_answers_cost_is_added_up_in_either_form(answer: dict[str, Any]) -> None:
    usage = usage_of(json.dumps({"usage": answer}).encode())
    assert plus(usage, usage_of(b'{"error": {}}')) == Usage(5, 3, 2)
    assert plus(usage, usage) == Usage(10, 6, 4)


async def test_a_byte_order_mark_is_no_part_of_the_first_line(keep: Keep, openai_client: Client) -> None:
    client = openai_client(await keep("hello"))
    batch = await ended(client, (await made(client, b"\xef\xbb\xbf" + jsonl(line("a"), line("b")))).id)
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}


async def test_text_completions_can_be_asked_too(keep: Keep, openai_client: Client) -> None:
    client = openai_client(await keep("hello"))
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 9}}
    batch = await ended(client, (await made(client, jsonl(request), endpoint="/v1/completions")).id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    answers = records((await client.files.content(batch.output_file_id)).content)
    assert answers["a"]["response"]["body"]["choices"][0]["text"] == "hello"


async def test_the_next_server_goes_on_where_the_one_before_was_ended(keep: Keep, openai_client: Client) -> None:
    before = await keep(engine={"pauses_after": 1}, batch_concurrency=2)
    client = openai_client(before)
    batch = await made(client, jsonl(*(line(f"r{i}") for i in range(6))))
    await until(lambda: len(before.engine.running) == 2)
    before.engine.resume.set()
    before.engine.resume.clear()
    await answered(client, batch.id, 2)
    await asyncio.wait_for(stop(before), 5)  # it waits for no line of a batch
    after = await keep("hello")
    client = openai_client(after)
    batch = await ended(client, batch.id)
    assert batch.request_counts.to_dict() == {"total": 6, "completed": 6, "failed": 0}
    answers = records((await client.files.content(batch.output_file_id)).content)
    assert set(answers) == {f"r{i}" for i in range(6)}
    told = [answer["response"]["body"]["usage"]["total_tokens"] for answer in answers.values()]
    assert batch.usage.total_tokens == sum(told)
    assert {request.priority for request in after.engine.requests} == {1}
    assert len(after.engine.requests) == 4


async def test_a_server_with_another_model_does_not_go_on(keep: Keep, openai_client: Client, tmp_path: Path) -> None:
    before = await keep(engine={"pauses_after": 0})
    batch = await made(openai_client(before), jsonl(line("a")))
    await before.engine.paused.wait()
    await stop(before)
    change(tmp_path, batch.id, model="models/older", model_name="older")
    batch = await ended(openai_client(await keep()), batch.id)
    (fault,) = batch.errors.data
    assert (batch.status, batch.model, fault.code) == ("failed", "older", "model_changed")
    assert "for older," in fault.message  # where its files were is nobody's business


async def test_an_answered_batch_whose_server_ended_gets_its_files(
    keep: Keep, openai_client: Client, tmp_path: Path
) -> None:
    before = await keep(engine={"pauses_after": 0})
    batch = await made(openai_client(before), jsonl(line("a")))
    await before.engine.paused.wait()
    await stop(before)
    (tmp_path / "kept" / "batches" / f"{batch.id}.good").rename(tmp_path / "kept" / "files" / "file-1")
    (tmp_path / "kept" / "files" / "file-1").write_bytes(b"moved already")
    change(tmp_path, batch.id, status="finalizing", outcome="completed", output_file_id="file-1")
    client = openai_client(await keep())
    batch = await ended(client, batch.id)
    assert (await client.files.content(batch.output_file_id)).content == b"moved already"


async def test_a_batch_whose_time_is_over_says_which_lines_have_no_answer(
    keep: Keep, openai_client: Client, tmp_path: Path
) -> None:
    before = await keep(engine={"pauses_after": 0})
    batch = await made(openai_client(before), jsonl(line("a"), line("b")))
    await before.engine.paused.wait()
    await stop(before)
    change(tmp_path, batch.id, expires_at=batch.created_at)
    client = openai_client(await keep(engine={"pauses_after": 0}))
    batch = await ended(client, batch.id)
    assert (batch.status, batch.request_counts.failed, batch.output_file_id) == ("expired", 2, None)
    errors = records((await client.files.content(batch.error_file_id)).content)
    assert {record["error"]["code"] for record in errors.values()} == {"batch_expired"}


async def test_a_batch_that_is_cancelled_while_its_file_is_read_asks_nothing(
    keep: Keep, openai_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(BatchInput):
        def __init__(self, path: Path, *, url: str | None = None) -> None:
            begun.set()
            go.wait()
            super().__init__(path, url=url)

    monkeypatch.setattr(worker, "BatchInput", Slow)
    running = await keep("hello")
    client = openai_client(running)
    first = await made(client, jsonl(line("a"), line("b")))
    await asyncio.to_thread(begun.wait)
    await client.batches.cancel(first.id)
    go.set()
    await ended(client, (await made(client, jsonl(line("c")))).id)
    first = await client.batches.retrieve(first.id)
    assert (first.status, len(running.engine.requests)) == ("cancelled", 1)


async def test_a_batch_can_be_cancelled_and_keeps_what_was_answered(keep: Keep, openai_client: Client) -> None:
    running = await keep(engine={"pauses_after": 0}, batch_concurrency=1)
    client = openai_client(running)
    first = await made(client, jsonl(line("a"), line("b")))
    second = await made(client, jsonl(line("c")))
    await running.engine.paused.wait()
    assert (await client.batches.cancel(second.id)).status == "cancelled"
    running.engine.paused.clear()
    running.engine.resume.set()
    running.engine.resume.clear()
    await answered(client, first.id, 1)
    await running.engine.paused.wait()
    assert (await client.batches.cancel(first.id)).status == "cancelling"
    batch = await ended(client, first.id)
    assert (batch.status, batch.request_counts.completed) == ("cancelled", 1)
    assert set(records((await client.files.content(batch.output_file_id)).content)) == {"a"}
    await running.engine.idle.wait()
    with pytest.raises(openai.ConflictError, match="cancelled"):
        await client.batches.cancel(first.id)


async def test_one_line_at_a_time_while_somebody_else_asks(keep: Keep, openai_client: Client) -> None:
    running = await keep("hello", engine={"pauses_after": 0}, batch_concurrency=3)
    asked = {"messages": [{"role": "user", "content": "x"}]}
    somebody = asyncio.create_task(running.post(CHAT, asked))
    await running.engine.paused.wait()
    client = openai_client(running)
    batch = await made(client, jsonl(*(line(str(i)) for i in range(8))))
    await until(lambda: len(running.engine.running) == 2)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(running.engine.running) == 2
    running.engine.resume.set()
    await somebody
    assert (await ended(client, batch.id)).request_counts.completed == 8


async def test_as_many_lines_as_allowed_run_while_nobody_asks(keep: Keep, openai_client: Client) -> None:
    running = await keep("hello", engine={"pauses_after": 0}, batch_concurrency=3)
    client = openai_client(running)
    batch = await made(client, jsonl(*(line(str(i)) for i in range(8))))
    await until(lambda: len(running.engine.running) == 3)
    assert {request.weight for request in running.engine.requests} == {0.1}
    running.engine.resume.set()
    assert (await ended(client, batch.id)).request_counts.completed == 8


async def test_a_line_that_a_full_server_refuses_is_asked_again(keep: Keep, openai_client: Client) -> None:
    running = await keep("hello", max_queued_requests=0)
    real = running.service.chat
    refused: list[bool] = []

    async def full(*args: Any) -> Any:
        if not refused:
            refused.append(True)
            raise OverloadedError("full", retry_after_s=0)
        return await real(*args)

    running.service.chat = full
    client = openai_client(running)
    batch = await ended(client, (await made(client, jsonl(line("a")))).id)
    assert refused
    assert batch.request_counts.to_dict() == {"total": 1, "completed": 1, "failed": 0}


async def test_keys_own_batches_whose_lines_need_none(keep: Keep, openai_client: Client) -> None:
    running = await keep("hello", api_keys=("mine", "yours"))
    client, other = openai_client(running, "mine"), openai_client(running, "yours")
    batch = await ended(client, (await made(client, jsonl(line("a")))).id)
    assert batch.request_counts.completed == 1
    for ask in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            await ask(batch.id)
    assert [each async for each in other.batches.list()] == []
    with pytest.raises(openai.NotFoundError):
        await other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")


async def test_a_file_that_a_batch_reads_stays(keep: Keep, openai_client: Client) -> None:
    running = await keep(engine={"pauses_after": 0})
    client = openai_client(running)
    batch = await made(client, jsonl(line("a")))
    with pytest.raises(openai.ConflictError, match=batch.id):
        await client.files.delete(batch.input_file_id)
    running.engine.resume.set()
    await ended(client, batch.id)
    assert (await client.files.delete(batch.input_file_id)).deleted


async def test_a_batch_that_fills_the_disk_fails_and_keeps_its_answers(keep: Keep, openai_client: Client) -> None:
    client = openai_client(await keep("hello", files_gib=4000 / 2**30 + 0.001, batch_concurrency=1))
    filler = await client.files.create(file=("a", b"x" * int(0.001 * 2**30)), purpose="batch")
    batch = await ended(client, (await made(client, jsonl(*(line(str(i)) for i in range(9))))).id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "storage_full")
    assert 0 < len(records((await client.files.content(batch.output_file_id)).content)) < 9
    await client.files.delete(filler.id)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint is '/v1/embeddings'"),
        ({"completion_window": "1h"}, "24h"),
        ({"metadata": {"x" * 65: "y"}}, "metadata"),
        ({"metadata": {str(i): "y" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"extra_body": {"nonsense": 1}}, "nonsense is not a field"),
    ],
)
async def test_what_cannot_be_meant_is_refused(keep: Keep, openai_client: Client, options: Any, told: str) -> None:
    client = openai_client(await keep())
    with pytest.raises(openai.BadRequestError, match=told):
        await made(client, jsonl(line("a")), **options)


async def test_an_empty_file_is_a_batch_that_failed(keep: Keep, openai_client: Client) -> None:
    client = openai_client(await keep())
    batch = await ended(client, (await made(client, b"\n")).id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "empty_file")
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id="file-0", endpoint=CHAT, completion_window="24h")


async def test_there_are_only_so_many_at_a_time(
    keep: Keep, openai_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_routes, "MAX_OPEN", 1)
    running = await keep(engine={"pauses_after": 0})
    client = openai_client(running)
    batch = await made(client, jsonl(line("a")))
    with pytest.raises(openai.RateLimitError, match="have not ended"):
        await made(client, jsonl(line("a")))
    await client.batches.cancel(batch.id)
