"""The page about the API names everything that the code serves or refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dashinfer_vlm import errors
from dashinfer_vlm.frontend.conversation import MessageBody, ProcessorBody
from dashinfer_vlm.frontend.parts import ImageBody, ImageUrlBody, VideoBody, VideoUrlBody
from dashinfer_vlm.server.errors import reply_to
from dashinfer_vlm.server.protocol import ChatBody, CompletionBody, GenerationBody

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_error_code_is_on_the_page() -> None:
    for name in errors.__all__:
        reply = reply_to(getattr(errors, name)("told"))
        assert f"`{reply.error.code}`" in PAGE
        assert re.search(rf"\b{reply.status}\b", PAGE)


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
