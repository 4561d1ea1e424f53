"""Responses, their items and the events of their streams as typed structs; msgspec writes them."""

from __future__ import annotations

from typing import Any

import msgspec

from dashinfer_vlm.frontend.deltas import Usage

Logprobs = list[msgspec.Raw]
"""Rows of `server.replies.ChatLogprob`."""


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    logprobs: Logprobs = []
    annotations: list[msgspec.Raw] = []


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


Part = OutputText | ReasoningText


class MessageItem(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    id: str
    status: str
    content: list[ReasoningText]
    summary: list[msgspec.Raw] = []
    encrypted_content: None = None


class CallItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    id: str
    status: str
    call_id: str
    name: str
    arguments: str


OutputItem = MessageItem | ReasoningItem | CallItem


class InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0
    """OpenAI asks money for these; here nobody does."""


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        prompt, output = usage.num_prompt_tokens, usage.num_output_tokens
        cached, thought = InputDetails(usage.num_cached_tokens), OutputDetails(usage.num_reasoning_tokens)
        return cls(prompt, cached, output, thought, prompt + output)


class ErrorInfo(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteInfo(msgspec.Struct, frozen=True):
    reason: str


class ResponseReply(msgspec.Struct, frozen=True, kw_only=True):
    """A response as it stands: what was asked, and what has come of it."""

    id: str
    object: str = "response"
    created_at: int
    model: str
    status: str = "in_progress"
    completed_at: int | None = None
    error: ErrorInfo | None = None
    incomplete_details: IncompleteInfo | None = None
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None

    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    user: str | None


class EventBase(msgspec.Struct, frozen=True, tag_field="type"):
    sequence_number: int

    @property
    def type(self) -> str:
        """Its name."""
        return str(self.__struct_config__.tag)


class ResponseEvent(EventBase, frozen=True):
    """The beginning or the end of a response."""

    response: ResponseReply


class Created(ResponseEvent, frozen=True, tag="response.created"): ...


class InProgress(ResponseEvent, frozen=True, tag="response.in_progress"): ...


class Completed(ResponseEvent, frozen=True, tag="response.completed"): ...


class Incomplete(ResponseEvent, frozen=True, tag="response.incomplete"): ...


class Failed(ResponseEvent, frozen=True, tag="response.failed"): ...


class ItemAdded(EventBase, frozen=True, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class ItemDone(EventBase, frozen=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class PartEvent(EventBase, frozen=True):
    item_id: str
    output_index: int
    content_index: int
    part: Part


class PartAdded(PartEvent, frozen=True, tag="response.content_part.added"): ...


class PartDone(PartEvent, frozen=True, tag="response.content_part.done"): ...


class TextDelta(EventBase, frozen=True, tag="response.output_text.delta"):
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: Logprobs


class TextDone(EventBase, frozen=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: Logprobs


class ReasoningDelta(EventBase, frozen=True, tag="response.reasoning_text.delta"):
    item_id: str
    output_index: int
    content_index: int
    delta: str


class ReasoningDone(EventBase, frozen=True, tag="response.reasoning_text.done"):
    item_id: str
    output_index: int
    content_index: int
    text: str


class ArgumentsDelta(EventBase, frozen=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(EventBase, frozen=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    arguments: str
    name: str


Event = (
    Created
    | InProgress
    | Completed
    | Incomplete
    | Failed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
