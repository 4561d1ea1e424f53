"""The rules that all request bodies share: unknown fields are refused, known but unsupported ones are named."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Tag
from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported"
"""Type of the validation error of a known field whose value this server does not serve."""
PART_TYPES = ("text", "image_url", "video_url", "video")


class Body(BaseModel):
    """A JSON object; numbers are numbers, and what is not declared is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


def only(*neutral: Any) -> Any:
    """Annotation of a known field that is accepted only with a value that means "not used"."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(n) and value == n for n in neutral):
            return value
        raise PydanticCustomError(UNSUPPORTED, "is not supported by this server; leave it out")

    return AfterValidator(check)


def _shape(value: Any) -> str | None:
    """Tag of a value that may be text or a list; the tags keep union names out of error paths."""
    if isinstance(value, str):
        return ":text"
    return ":list" if isinstance(value, list) else None


def _nesting(value: Any) -> str | None:
    """Tag of a prompt: text, texts, ids or lists of ids."""
    if not isinstance(value, list) or not value:
        return _shape(value)
    if isinstance(value[0], str):
        return ":texts"
    return ":lists" if isinstance(value[0], list) else ":list"


TextOrTexts = Annotated[Annotated[str, Tag(":text")] | Annotated[list[str], Tag(":list")], Discriminator(_shape)]
Prompts = Annotated[
    Annotated[str, Tag(":text")]
    | Annotated[list[str], Tag(":texts")]
    | Annotated[list[int], Tag(":list")]
    | Annotated[list[list[int]], Tag(":lists")],
    Discriminator(_nesting),
]
shape_of_content = Discriminator(_shape)
