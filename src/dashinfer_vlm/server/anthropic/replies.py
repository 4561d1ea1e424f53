"""Answers and events of Anthropic's Messages API as typed structs."""

from __future__ import annotations

import msgspec

from dashinfer_vlm.frontend.generation import Usage
from dashinfer_vlm.frontend.messages import ToolCall

NO_SIGNATURE = "unsigned"
"""Stands where Anthropic proves that its model wrote a thought. Clients send thoughts back only with some signature."""


class OutputTokens(msgspec.Struct, frozen=True):
    thinking_tokens: int


class UsageReply(msgspec.Struct, frozen=True):
    """All tokens of the prompt are those of the three input fields together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokens

    @classmethod
    def of(cls, usage: Usage) -> UsageReply:
        cached = usage.num_cached_tokens
        details = OutputTokens(usage.num_reasoning_tokens)
        return cls(usage.num_prompt_tokens - cached, 0, cached, usage.num_output_tokens, details)


class TextBlock(msgspec.Struct, frozen=True):
    text: str
    type: str = "text"


class ThinkingBlock(msgspec.Struct, frozen=True):
    thinking: str
    signature: str
    type: str = "thinking"


class ToolUseBlock(msgspec.Struct, frozen=True):
    id: str
    name: str
    input: msgspec.Raw
    type: str = "tool_use"

    @classmethod
    def of(cls, call: ToolCall) -> ToolUseBlock:
        """`call` is a whole one of an answer, and has its id."""
        assert call.id is not None, call
        return cls(tool_use_id(call.id), call.name, msgspec.Raw(call.arguments.encode()))


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessageReply(msgspec.Struct, frozen=True):
    id: str
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: UsageReply
    role: str = "assistant"
    type: str = "message"


class TextDelta(msgspec.Struct, frozen=True):
    text: str
    type: str = "text_delta"


class ThinkingDelta(msgspec.Struct, frozen=True):
    thinking: str
    type: str = "thinking_delta"


class SignatureDelta(msgspec.Struct, frozen=True):
    signature: str
    type: str = "signature_delta"


class InputJsonDelta(msgspec.Struct, frozen=True):
    partial_json: str
    type: str = "input_json_delta"


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class MessageStart(msgspec.Struct, frozen=True):
    message: MessageReply
    type: str = "message_start"


class Ping(msgspec.Struct, frozen=True):
    type: str = "ping"


class BlockStart(msgspec.Struct, frozen=True):
    index: int
    content_block: Block
    type: str = "content_block_start"


class BlockNews(msgspec.Struct, frozen=True):
    index: int
    delta: BlockDelta
    type: str = "content_block_delta"


class BlockStop(msgspec.Struct, frozen=True):
    index: int
    type: str = "content_block_stop"


class StopDelta(msgspec.Struct, frozen=True):
    stop_reason: str
    stop_sequence: str | None


class MessageNews(msgspec.Struct, frozen=True):
    delta: StopDelta
    usage: UsageReply
    type: str = "message_delta"


class MessageStop(msgspec.Struct, frozen=True):
    type: str = "message_stop"


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


def tool_use_id(call_id: str) -> str:
    """A call's id with the beginning that Anthropic's have."""
    return "toolu_" + call_id.removeprefix("call_")
