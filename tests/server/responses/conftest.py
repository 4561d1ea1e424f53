"""What the tests of responses have in common."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dashinfer_vlm.frontend.template import ChatTemplate
from dashinfer_vlm.frontend.tokenizer import Tokenizer
from tests.server.conftest import Parts, Running
from tests.server.test_reasoning import ALWAYS


@pytest.fixture(scope="session")
def thinking(tokenizer: Tokenizer) -> Parts:
    """Servers of a model that thinks."""
    return Parts(tokenizer, ChatTemplate(ALWAYS, tokenizer))


def prompt_of(running: Running, tokenizer: Tokenizer, number: int = -1) -> str:
    return tokenizer.decode(running.engine.requests[number].prompt_ids, skip_special=False)


async def events(running: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; their names are those of their data."""
    reply = await running.post("/v1/responses", {"stream": True} | body)
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    told = []
    for block in reply.text.strip().split("\n\n"):
        name, data = block.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told
