"""The items of a response's input: turns, calls of tools, their results, and reasoning.

Items of an output are items of an input too, so that answers may be sent back as they came.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from dashinfer_vlm.frontend.parts import (
    FORMS,
    ChatPart,
    ImageOptions,
    MediumBody,
    TextualBody,
    by_type,
    one_of,
)
from dashinfer_vlm.frontend.schema import Body, by_shape, json_type, meant, no_effect, only, unsupported

Status = Literal["in_progress", "completed", "incomplete"]


class InputTextBody(TextualBody):
    type: Literal["input_text"]


class OutputTextBody(TextualBody):
    """What an assistant said."""

    type: Literal["output_text"]
    annotations: Annotated[Any, only([])] = None
    logprobs: Annotated[list[Any] | None, no_effect] = None
    """Of the answer that it came from; no effect."""


class InputImageBody(MediumBody, ImageOptions):
    kind = "image"
    type: Literal["input_image"]
    image_url: str
    file_id: Annotated[Any, only()] = None

    @model_validator(mode="before")
    @classmethod
    def _is_no_file(cls, value: Any) -> Any:
        """Said before `image_url` is missed, in whose place a file is named."""
        if isinstance(value, dict) and value.get("file_id") is not None:
            raise unsupported("names a file; send the picture as image_url, a URL or data: URL", field="file_id")
        return value

    @property
    def place(self) -> str:
        return "image_url"

    def named(self) -> str:
        return self.image_url


_FORMS = {
    "input_text": '{"type": "input_text", "text": ...}',
    "input_image": '{"type": "input_image", "image_url": URL}',
    "output_text": '{"type": "output_text", "text": ...}',
    **FORMS,
}
AnyPart = Annotated[
    Annotated[InputTextBody, Tag(":input_text")]
    | Annotated[OutputTextBody, Tag(":output_text")]
    | Annotated[InputImageBody, Tag(":input_image")]
    | ChatPart,
    by_type,
    one_of(_FORMS),
]
"""Chat's parts are taken too: this API has no word for a video."""
Content: TypeAlias = Annotated[Annotated[str, Tag(":text")] | Annotated[list[AnyPart], Tag(":list")], by_shape]


class ItemBody(Body):
    id: str | None = None
    status: Status | None = None


class MessageItemBody(ItemBody):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Annotated[str | None, no_effect] = None
    """Of models that comment on their own work; no effect."""


class CallItemBody(ItemBody):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: Annotated[Any, only()] = None
    caller: Annotated[Any, only({"type": "direct"})] = None
    async_: Annotated[Any, only(False)] = Field(None, alias="async")


class CallOutputItemBody(ItemBody):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None
    namespace: Annotated[Any, only()] = None
    caller: Annotated[Any, only({"type": "direct"})] = None


class SummaryBody(Body):
    type: Literal["summary_text"]
    text: str


class ThoughtBody(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItemBody(ItemBody):
    """What the model thought before it said or called what follows."""

    type: Literal["reasoning"]
    summary: list[SummaryBody]
    content: list[ThoughtBody] | None = None
    encrypted_content: Annotated[Any, only()] = None

    @property
    def text(self) -> str:
        return "".join(thought.text for thought in self.content or self.summary)


class ReferenceBody(Body):
    """Stands for an item of an earlier response that is kept here."""

    type: Literal["item_reference"]
    id: str


_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _checked(value: Any) -> Any:
    """A turn need not say that it is one, nor a reference that it is one."""
    if not isinstance(value, dict):
        raise meant(f"has the wrong type, {json_type(value)}; an item is an object")
    if value.get("type") is None:
        return {**value, "type": "item_reference" if value.keys() <= {"id", "type"} else "message"}
    if value["type"] not in _TYPES:
        raise unsupported(f"has type {str(value['type'])[:80]!r}; supported are {', '.join(_TYPES)}", field="type")
    return value


AnyItem = MessageItemBody | CallItemBody | CallOutputItemBody | ReasoningItemBody
"""What an input says in the end."""
AnyItemBody = Annotated[
    Annotated[MessageItemBody, Tag(":message")]
    | Annotated[CallItemBody, Tag(":function_call")]
    | Annotated[CallOutputItemBody, Tag(":function_call_output")]
    | Annotated[ReasoningItemBody, Tag(":reasoning")]
    | Annotated[ReferenceBody, Tag(":item_reference")],
    Discriminator(lambda item: f":{item['type']}"),
    BeforeValidator(_checked),
]
Input: TypeAlias = Annotated[Annotated[str, Tag(":text")] | Annotated[list[AnyItemBody], Tag(":list")], by_shape]
