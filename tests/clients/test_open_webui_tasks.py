"""Open WebUI's tasks behind a message, each as long as the context allows: it sets no limit."""

from __future__ import annotations

import httpx
import pytest
from webui import webui

from conftest import MODEL, QUESTION

pytestmark = pytest.mark.clients

__all__ = ["webui"]


@pytest.mark.parametrize("task", ["title", "follow_up", "tags"])
def test_a_task_behind_a_message_is_answered(webui: httpx.Client, task: str) -> None:
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A red circle."}]
    reply = webui.post(f"/api/v1/tasks/{task}/completions", json={"model": MODEL, "messages": said})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"], reply.text
