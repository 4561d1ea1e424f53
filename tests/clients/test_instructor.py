"""instructor: every mode that its OpenAI provider has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import httpx
import instructor
import openai
import pytest

from conftest import MODEL, QUESTION, Seen

pytestmark = pytest.mark.clients

FORCED = [
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
    instructor.Mode.FUNCTIONS,
]
ASKED = [instructor.Mode.JSON, instructor.Mode.MD_JSON, instructor.Mode.JSON_O1]
"""Modes that describe the form in the prompt, and leave it to the model."""


def create(url: str, mode: instructor.Mode, picture: str, form: Any = Seen, statuses: list[int] | None = None) -> Any:
    """Its answer; `statuses` are those of the server's."""

    def note(reply: httpx.Response) -> None:
        if statuses is not None:
            statuses.append(reply.status_code)

    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    with httpx.Client(event_hooks={"response": [note]}, timeout=200) as http:
        plain = openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0, http_client=http)
        client = instructor.from_openai(plain, mode=mode)
        return client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": parts}],
            response_model=form,
            max_retries=1,
            temperature=0,
            max_tokens=1000,
        )


@pytest.mark.parametrize("mode", FORCED)
def test_a_mode_that_forces_the_form_gives_an_object(url: str, mode: instructor.Mode, picture: str) -> None:
    assert isinstance(create(url, mode, picture), Seen)


@pytest.mark.parametrize(
    ("mode", "form"), [*((mode, Seen) for mode in ASKED), (instructor.Mode.PARALLEL_TOOLS, Iterable[Seen])]
)
def test_a_mode_that_leaves_the_form_to_the_model_is_answered(
    url: str, mode: instructor.Mode, form: Any, picture: str
) -> None:
    """Random weights follow no prompt, so that the client finds no object; the server has not refused anything."""
    statuses: list[int] = []
    with contextlib.suppress(Exception):
        create(url, mode, picture, form, statuses)
    assert set(statuses) == {200}
