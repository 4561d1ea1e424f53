"""Answers and events of Anthropic's Messages API as typed structs."""

from __future__ import annotations

from typing import Literal

import msgspec

from dashinfer_vlm.frontend.deltas import Usage
from dashinfer_vlm.frontend.messages import ToolCall

NO_SIGNATURE = "unsigned"
"""Stands where Anthropic proves that its model wrote a thought. Clients send thoughts back only with some signature."""


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Told(msgspec.Struct, frozen=True, tag_field="type"):
    """What says by its `type` what it is."""

    @property
    def type(self) -> str:
        tag = self.__struct_config__.tag
        assert isinstance(tag, str), self
        return tag


class OutputTokens(msgspec.Struct, frozen=True):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, frozen=True):
    """All tokens of the prompt are those of the three input fields together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokens

    @classmethod
    def of(cls, usage: Usage) -> MessageUsage:
        cached = usage.num_cached_tokens
        details = OutputTokens(usage.num_reasoning_tokens)
        return cls(usage.num_prompt_tokens - cached, 0, cached, usage.num_output_tokens, details)


class TextBlock(Told, frozen=True, tag="text"):
    text: str


class ThinkingBlock(Told, frozen=True, tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Told, frozen=True, tag="tool_use"):
    id: str
    name: str
    input: msgspec.Raw

    @classmethod
    def of(cls, call: ToolCall) -> ToolUseBlock:
        """`call` is a whole one of an answer, and has its id."""
        assert call.id is not None, call
        return cls(tool_use_id(call.id), call.name, msgspec.Raw(call.arguments.encode()))


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessageReply(Told, frozen=True, tag="message"):
    id: str
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    role: Literal["assistant"] = "assistant"


class TextBlockDelta(Told, frozen=True, tag="text_delta"):
    text: str


class ThinkingDelta(Told, frozen=True, tag="thinking_delta"):
    thinking: str


class SignatureDelta(Told, frozen=True, tag="signature_delta"):
    signature: str


class InputJsonDelta(Told, frozen=True, tag="input_json_delta"):
    partial_json: str


BlockDelta = TextBlockDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class MessageStart(Told, frozen=True, tag="message_start"):
    message: MessageReply


class Ping(Told, frozen=True, tag="ping"):
    pass


class BlockStart(Told, frozen=True, tag="content_block_start"):
    index: int
    content_block: Block


class BlockNews(Told, frozen=True, tag="content_block_delta"):
    index: int
    delta: BlockDelta


class BlockStop(Told, frozen=True, tag="content_block_stop"):
    index: int


class StopDelta(msgspec.Struct, frozen=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageNews(Told, frozen=True, tag="message_delta"):
    delta: StopDelta
    usage: MessageUsage


class MessageStop(Told, frozen=True, tag="message_stop"):
    pass


Event = MessageStart | Ping | BlockStart | BlockNews | BlockStop | MessageNews | MessageStop


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


def tool_use_id(call_id: str) -> str:
    """A call's id with the beginning that Anthropic's have."""
    return "toolu_" + call_id.removeprefix("call_")
