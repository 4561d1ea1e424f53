"""Batch files: every line is answered once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import queue
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dashinfer_vlm.errors import ConfigError, EngineDeadError
from dashinfer_vlm.offline.pipes import PipedInput
from dashinfer_vlm.server.access import Access
from dashinfer_vlm.server.batches import run
from dashinfer_vlm.server.batches.ends import BatchInput, BatchOutput
from dashinfer_vlm.server.batches.lines import BatchRecord, Line, line_number, numbered_lines, record_id
from dashinfer_vlm.server.batches.run import BatchRun


def line(name: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "model", "prompt": name}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body, **changes}


class Files:
    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "input.jsonl", folder / "output.jsonl"

    def write(self, *lines: dict[str, Any] | str) -> None:
        self.input.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(record) for record in self.output.read_bytes().splitlines()]

    async def run(
        self, app: ASGIApp, *, window: int = 4, is_alive: Callable[[], bool] = lambda: True
    ) -> list[BatchRecord]:
        heard: list[BatchRecord] = []
        output = BatchOutput(self.output)
        try:
            await BatchRun(app, output, window=lambda: window, is_alive=is_alive, on_record=heard.append).run(
                BatchInput(self.input)
            )
        finally:
            output.close()
        return heard


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


class Echo(FastAPI):
    """Answers with the prompt; counts how often, and how many at once, it is asked."""

    def __init__(self, crowd: int = 0) -> None:
        """Nothing is answered before so many requests have been there at once."""
        super().__init__()
        self.crowd, self.crowded = crowd, asyncio.Event()
        self.asked: Counter[str] = Counter()
        self.num_running = self.most_running = 0
        self.add_middleware(Access)
        self.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)

    async def complete(self, request: Request) -> JSONResponse:
        prompt = (await request.json())["prompt"]
        self.asked[prompt] += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        if self.num_running >= self.crowd:
            self.crowded.set()
        await self.crowded.wait()
        await asyncio.sleep(0)
        self.num_running -= 1
        if prompt == "bad":
            return JSONResponse({"error": {"message": "too bad"}}, status_code=400)
        return JSONResponse({"text": prompt})


async def test_every_line_gets_its_answer(files: Files) -> None:
    files.write(line("a"), "", line("bad"), line("ü"))
    app = Echo()
    heard = await files.run(app)
    records = {record["custom_id"]: record for record in files.records()}
    assert [line_number(records[name]["id"]) for name in ("a", "bad", "ü")] == [1, 3, 4]
    assert (records["a"]["response"]["status_code"], records["a"]["response"]["body"]) == (200, {"text": "a"})
    assert len({record["response"]["request_id"] for record in records.values()}) == 3
    assert records["bad"]["response"]["status_code"] == 400
    assert records["bad"]["error"] is None
    assert sorted(record.is_good for record in heard) == [False, True, True]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("{", "not a batch request"),
        ("[]", "not a batch request"),
        ('{"custom_id": "x"}', "url"),
        (json.dumps(line("x", custom_id=5)), "custom_id"),
        (json.dumps(line("x", body="text")), "object"),
        (json.dumps(line("x", method="GET")), "GET /v1/completions"),
        (json.dumps(line("x", url="/metrics")), "POST /metrics"),
        (json.dumps(line("x", url="http://example.org/v1/completions")), "example.org"),
        (json.dumps(line("x", body={"stream": True})), "stream"),
        (json.dumps(line("a")), "same custom_id"),
    ],
)
async def test_a_line_that_is_no_request_spares_the_others(wrong: str, reason: str, files: Files) -> None:
    files.write(line("a"), wrong, line("b"))
    await files.run(Echo())
    records = {line_number(record["id"]): record for record in files.records()}
    assert len(records) == 3
    assert records[2]["response"] is None
    assert records[2]["error"]["code"] == "invalid_request"
    assert reason in records[2]["error"]["message"]


def test_no_two_records_have_the_same_id() -> None:
    ids = [record_id(7) for _ in range(100)]
    assert (len(set(ids)), {line_number(id) for id in ids}) == (100, {7})
    assert [line_number(id) for id in ("batch_req_7", "batch_req_x", f"{ids[0]}.")] == [None] * 3


async def test_a_second_run_asks_only_what_is_open(files: Files) -> None:
    files.write(*[line(f"r{i}") for i in range(10)])
    app = Echo()
    await files.run(app)
    whole = files.output.read_bytes().splitlines(keepends=True)
    files.output.write_bytes(b"".join(whole[:6]) + whole[6][:20])  # killed in the middle of a write
    await files.run(app)
    assert Counter(record["custom_id"] for record in files.records()) == Counter(f"r{i}" for i in range(10))
    assert sorted(app.asked.values()) == [1] * 6 + [2] * 4
    await files.run(app)
    assert app.asked.total() == 14


async def test_an_engine_that_dies_leaves_its_lines_open(files: Files) -> None:
    files.write(*[line(f"r{i}") for i in range(10)])
    app = Echo()
    with pytest.raises(EngineDeadError, match="same command again"):
        await files.run(app, is_alive=lambda: app.asked.total() < 5)
    assert len(files.records()) < 5
    await files.run(app)
    assert Counter(record["custom_id"] for record in files.records()) == Counter(f"r{i}" for i in range(10))


async def test_a_server_without_an_engine_is_asked_again_when_it_has_one(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_RETRY_S", 0.0)
    files.write(line("a"))
    app = Echo()
    statuses = [503, 503, 200]

    async def restarting(scope: Scope, receive: Receive, send: Send) -> None:
        if (status := statuses.pop(0)) == 200:
            await app(scope, receive, send)
        else:
            await Response(status_code=status)(scope, receive, send)

    heard = await files.run(restarting)
    assert [record.is_good for record in heard] == [True]


async def test_at_most_a_window_of_requests_runs_at_once(files: Files) -> None:
    files.write(*[line(f"r{i}") for i in range(20)])
    app = Echo(crowd=3)
    await files.run(app, window=3)
    assert app.most_running == 3


async def test_an_output_of_another_input_is_refused(files: Files) -> None:
    files.write(line("a"), line("b"))
    await files.run(Echo())
    files.write(line("a"), line("c"))
    with pytest.raises(ConfigError, match=r"answers 'b' in line 2, where .* has 'c'"):
        await files.run(Echo())
    files.write(line("a"))
    with pytest.raises(ConfigError, match="line 2, which"):
        await files.run(Echo())
    assert len(files.records()) == 2


@pytest.mark.parametrize("content", ["hello\n", '{"id": "mine", "custom_id": "a"}\n'])
def test_a_file_that_holds_something_else_is_not_touched(content: str, files: Files) -> None:
    files.output.write_text(content)
    with pytest.raises(ConfigError, match=r"output\.jsonl holds"):
        BatchOutput(files.output)
    assert files.output.read_text() == content


def test_a_record_is_written_whole_though_the_system_takes_it_in_parts(files: Files) -> None:
    """As on a disk that is nearly full."""
    output = BatchOutput(files.output)
    file = output._file

    class Short:
        closed = False

        def write(self, data: bytes) -> int:
            return file.write(data[:20])

    output._file = Short()  # type: ignore[assignment]
    for number in (1, 2):
        output.write(BatchRecord(id=record_id(number), custom_id=f"line {number}"))
    file.close()
    with closing(BatchOutput(files.output)) as again:
        assert again.done == {1: "line 1", 2: "line 2"}


def test_two_runs_cannot_share_an_output(files: Files) -> None:
    first = BatchOutput(files.output)
    with pytest.raises(ConfigError, match="another run"):
        BatchOutput(files.output)
    first.close()
    BatchOutput(files.output).close()


class Piped:
    """Lines that come when the test says so, from a pipe that stays open."""

    num_lines = None

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def check(self, done: dict[int, str | None]) -> None:
        assert not done

    def open_lines(self, done: dict[int, str | None]) -> Iterator[Line]:
        return numbered_lines(text.encode() for text in iter(self.lines.get, None))


async def test_an_answer_is_written_while_the_next_line_is_awaited(files: Files) -> None:
    source, output = Piped(), BatchOutput(files.output)
    heard: asyncio.Queue[BatchRecord] = asyncio.Queue()
    reading = BatchRun(Echo(), output, window=lambda: 4, is_alive=lambda: True, on_record=heard.put_nowait)
    running = asyncio.create_task(reading.run(source))
    for name in "ab":
        source.lines.put(json.dumps(line(name)))
        assert (await asyncio.wait_for(heard.get(), 30)).custom_id == name
    source.lines.put(None)
    await running
    output.close()
    assert [record["custom_id"] for record in files.records()] == ["a", "b"]


async def test_a_pipe_does_not_go_on_from_answers_that_may_be_those_of_others(files: Files) -> None:
    files.write(line("a"))
    await files.run(Echo())
    output = BatchOutput(files.output)
    with pytest.raises(ConfigError, match="cannot go on"):
        PipedInput().check(output.done)
    output.close()


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no/such"):
        BatchInput(tmp_path / "no" / "such")
    with pytest.raises(ConfigError, match="no/such"):
        BatchOutput(tmp_path / "no" / "such")
