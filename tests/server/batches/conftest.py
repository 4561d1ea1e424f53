"""Servers that keep files in a folder of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Running, Serve

Keep = Callable[..., Any]
CHAT: Any = "/v1/chat/completions"


def line(name: str, url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": name}], "max_tokens": 9}
    return {"custom_id": name, "method": "POST", "url": url, "body": body | changes}


def jsonl(*lines: Any) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


def records(content: bytes) -> dict[str | None, Any]:
    """By custom id."""
    return {record["custom_id"]: record for record in map(json.loads, content.splitlines())}


@pytest.fixture
def keep(serve: Serve, tmp_path: Path) -> Keep:
    """`await keep("hello", max_files=3, keys=("a", "b"), engine={})`; another one starts on the same folder."""

    async def start(text: str = "hello", engine: Any = None, **config: Any) -> Running:
        options = {"files_path": str(tmp_path / "kept"), **config}
        running: Running = await serve(text, engine=engine or {}, config=options)
        return running

    return start
