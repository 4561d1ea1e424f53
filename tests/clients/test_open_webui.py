"""Open WebUI with its default settings: a first message with a picture, with which it sends its built-in tools, and the
title that it asks for afterwards."""

from __future__ import annotations

import time
import uuid
from typing import Any

import httpx
import pytest
from webui import webui

from conftest import MODEL, QUESTION

pytestmark = pytest.mark.clients

__all__ = ["webui"]


def new_chat(webui: httpx.Client, user: dict[str, Any], answer: dict[str, Any]) -> str:
    """The id of a chat as the page makes one, whose answer is still empty."""
    history = {"messages": {user["id"]: user, answer["id"]: answer}, "currentId": answer["id"]}
    chat = {"title": "New Chat", "models": [MODEL], "history": history, "messages": [user, answer]}
    return str(webui.post("/api/v1/chats/new", json={"chat": chat}).json()["id"])


def finished(webui: httpx.Client, chat_id: str, answer_id: str) -> tuple[str, dict[str, Any]]:
    """Its title and its answer, once both are there."""
    for _ in range(240):
        chat = webui.get(f"/api/v1/chats/{chat_id}").json()
        answer = chat["chat"]["history"]["messages"][answer_id]
        if "error" in answer or (answer.get("done") and chat["title"] != "New Chat"):
            return chat["title"], answer
        time.sleep(1)
    raise AssertionError("no answer came")


def test_a_first_message_with_a_picture_is_answered_and_the_chat_gets_a_title(
    webui: httpx.Client, picture: str
) -> None:
    user: dict[str, Any] = {"id": str(uuid.uuid4()), "parentId": None, "role": "user", "content": QUESTION}
    answer: dict[str, Any] = {"id": str(uuid.uuid4()), "parentId": user["id"], "role": "assistant", "content": ""}
    user["childrenIds"], answer["childrenIds"] = [answer["id"]], []
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": picture}}]
    chat_id = new_chat(webui, user, answer)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": parts}],
        "stream": True,
        # random weights find no end, and left alone may write line breaks, of which nothing is kept
        "params": {"max_tokens": 16, "presence_penalty": 2},
        "session_id": str(uuid.uuid4()),
        "chat_id": chat_id,
        "id": answer["id"],
        "background_tasks": {"title_generation": True},
    }
    assert webui.post("/api/chat/completions", json=body).json()["status"]
    title, told = finished(webui, chat_id, answer["id"])
    assert "error" not in told
    assert told["content"]
    assert title
