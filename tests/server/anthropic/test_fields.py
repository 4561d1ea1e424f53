"""Every field that Anthropic's pinned client can send is known here, and stands on the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from anthropic import types
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from pydantic import BaseModel

from dashinfer_vlm.server.anthropic import blocks, protocol

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "messages.md").read_text(encoding="utf-8")
PAIRS: list[tuple[Any, type[BaseModel]]] = [
    (MessageCreateParamsStreaming, protocol.MessagesBody),
    (types.MessageCountTokensParams, protocol.CountTokensBody),
    (types.ToolParam, protocol.CustomToolBody),
    (types.ToolChoiceToolParam, protocol.ToolChoiceBody),
    (types.ThinkingConfigEnabledParam, protocol.ThinkingConfigBody),
    (types.OutputConfigParam, protocol.OutputConfigBody),
    (types.MetadataParam, protocol.MetadataBody),
    (types.TextBlockParam, blocks.TextBlockBody),
    (types.ImageBlockParam, blocks.ImageBlockBody),
    (types.Base64ImageSourceParam, blocks.Base64SourceBody),
    (types.URLImageSourceParam, blocks.UrlSourceBody),
    (types.ToolUseBlockParam, blocks.ToolUseBody),
    (types.ToolResultBlockParam, blocks.ToolResultBody),
    (types.ThinkingBlockParam, blocks.ThinkingBody),
    (types.RedactedThinkingBlockParam, blocks.RedactedThinkingBody),
]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_every_field_of_the_client_is_known(theirs: Any, ours: type[BaseModel]) -> None:
    known = {info.alias or name for name, info in ours.model_fields.items()}
    assert set(get_type_hints(theirs)) <= known


@pytest.mark.parametrize("body", [protocol.MessagesBody, protocol.CustomToolBody])
def test_every_field_of_a_request_is_on_the_page(body: type[BaseModel]) -> None:
    plain = {"model", "name", "type", "description", "input_schema"}
    missing = [name for name in body.model_fields.keys() - plain if not re.search(rf"`[\w.]*\b{name}\b", PAGE)]
    assert not missing
