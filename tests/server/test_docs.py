"""The page about the API names everything that the code serves or refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import dashinfer_vlm
from dashinfer_vlm import errors
from dashinfer_vlm.frontend.conversation import MessageBody, ProcessorBody
from dashinfer_vlm.frontend.parts import ImageBody, ImageUrlBody, VideoBody, VideoUrlBody
from dashinfer_vlm.server.errors import reply_to
from dashinfer_vlm.server.protocol import ChatBody, CompletionBody, GenerationBody

PAGES = Path(__file__).resolve().parents[2] / "docs"
CLIENTS = Path(__file__).resolve().parents[1] / "clients"
PAGE = (PAGES / "api.md").read_text(encoding="utf-8")


def test_every_error_code_is_on_the_page() -> None:
    for name in errors.__all__:
        reply = reply_to(getattr(errors, name)("told"))
        assert f"`{reply.error.code}`" in PAGE
        assert re.search(rf"\b{reply.status}\b", PAGE)


def test_every_reason_of_a_refusal_is_among_the_limits() -> None:
    text = (PAGES / "security.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in Path(dashinfer_vlm.__file__).parent.rglob("*.py")]
    reasons = {reason for source in sources for reason in re.findall(r'reason="([a-z_]+)"', source)}
    assert len(reasons) > 5
    for reason in {*reasons, "key_requests", "key_tokens"} | set(
        re.findall(r'_check\(.*"(queued_\w+)"', "".join(sources))
    ):
        assert f"`{reason}`" in text, reason


def test_clients_are_told_in_the_versions_that_are_pinned() -> None:
    told = re.findall(r"^\| `([a-z-]+)`(?: of npm)?.* \| ([0-9.]+) \|", PAGE, re.MULTILINE)
    pinned = "".join(path.read_text(encoding="utf-8") for path in sorted(CLIENTS.glob("requirements/*.txt")))
    npm = json.loads((CLIENTS / "npm" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    known = set(re.findall(r"^([a-z-]+)==([0-9.]+)$", pinned, re.MULTILINE)) | set(npm.items())
    assert len(told) > 10
    assert set(told) <= known


def test_every_sampling_field_is_on_the_page() -> None:
    served = {name for name, info in GenerationBody.model_fields.items() if not info.metadata}
    for name in served - {"model"}:
        assert re.search(rf"`{name}\b", PAGE), name
    for body in (ChatBody, CompletionBody):
        assert body.model_fields.keys() > served


@pytest.mark.parametrize("body", [MessageBody, ImageUrlBody, VideoUrlBody, ImageBody, VideoBody, ProcessorBody])
def test_every_served_field_of_a_message_is_on_the_page(body: type[BaseModel]) -> None:
    served = {name for name, info in body.model_fields.items() if not info.metadata}
    for name in served:
        assert re.search(rf"`{name}\b", PAGE), name
