"""The turns and blocks of a conversation as Anthropic's clients write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag

from dashinfer_vlm.frontend.parts import instead_of
from dashinfer_vlm.frontend.schema import Body, by_shape, json_type, meant, no_effect, only, unsupported


def _known(field: str, *values: str, instead: Callable[[str], str] = instead_of) -> BeforeValidator:
    """Checks that an object says which of several it is; `instead` has a hint for one that says something else."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise meant(f"has the wrong type, {json_type(value)}; it must be an object")
        if field not in value:
            raise meant(f"has no {field}; it must be one of {', '.join(values)}", field=field)
        if value[field] not in values:
            told = f"has {field} {str(value[field])[:80]!r}; here {', '.join(values)} are known"
            raise unsupported(told + instead(value[field]), field=field)
        return value

    return BeforeValidator(check)


def _by(field: str) -> Discriminator:
    """Tells apart objects that `_known` has checked; their tags begin with a colon, which keeps them out of paths."""
    return Discriminator(lambda value: f":{value[field]}")


class BlockBody(Body):
    cache_control: Annotated[dict[str, Any] | None, no_effect] = None
    """No effect: prefixes are cached without being asked."""


class TextBlockBody(BlockBody):
    type: Literal["text"]
    text: str
    citations: Annotated[Any, only([])] = None


class Base64SourceBody(Body):
    type: Literal["base64"]
    data: str
    media_type: Annotated[str, no_effect]
    """No effect: the picture's bytes say what it is."""


class UrlSourceBody(Body):
    type: Literal["url"]
    url: str


SourceBody = Annotated[
    Annotated[Base64SourceBody, Tag(":base64")] | Annotated[UrlSourceBody, Tag(":url")],
    _by("type"),
    _known("type", "base64", "url", instead=lambda _: "; send the picture itself"),
]


class ImageBlockBody(BlockBody):
    type: Literal["image"]
    source: SourceBody
    transformations: Annotated[Any, only({}, {"oversized_image": "downsize"})] = None


ResultBlockBody = Annotated[
    Annotated[TextBlockBody, Tag(":text")] | Annotated[ImageBlockBody, Tag(":image")],
    _by("type"),
    _known("type", "text", "image"),
]


class ToolResultBody(BlockBody):
    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[Annotated[str, Tag(":text")] | Annotated[list[ResultBlockBody], Tag(":list")], by_shape] | None
    ) = None
    is_error: bool | None = None
    toolset_name: Annotated[Any, only()] = None


class ToolUseBody(BlockBody):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Annotated[Any, only({"type": "direct"})] = None
    toolset_name: Annotated[Any, only()] = None


class ThinkingBody(Body):
    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str | None, no_effect] = None
    """No effect: nothing is signed here."""


class RedactedThinkingBody(Body):
    """No effect: nobody but its author can read it."""

    type: Literal["redacted_thinking"]
    data: Annotated[str, no_effect]


UserBlockBody = Annotated[
    Annotated[TextBlockBody, Tag(":text")]
    | Annotated[ImageBlockBody, Tag(":image")]
    | Annotated[ToolResultBody, Tag(":tool_result")],
    _by("type"),
    _known("type", "text", "image", "tool_result"),
]
AssistantBlockBody = Annotated[
    Annotated[TextBlockBody, Tag(":text")]
    | Annotated[ToolUseBody, Tag(":tool_use")]
    | Annotated[ThinkingBody, Tag(":thinking")]
    | Annotated[RedactedThinkingBody, Tag(":redacted_thinking")],
    _by("type"),
    _known("type", "text", "tool_use", "thinking", "redacted_thinking"),
]
AnyBlockBody = UserBlockBody | AssistantBlockBody

TextOrBlocks = Annotated[Annotated[str, Tag(":text")] | Annotated[list[TextBlockBody], Tag(":list")], by_shape]


class UserTurnBody(Body):
    role: Literal["user"]
    content: Annotated[Annotated[str, Tag(":text")] | Annotated[list[UserBlockBody], Tag(":list")], by_shape]


class AssistantTurnBody(Body):
    role: Literal["assistant"]
    content: Annotated[Annotated[str, Tag(":text")] | Annotated[list[AssistantBlockBody], Tag(":list")], by_shape]


class SystemTurnBody(Body):
    role: Literal["system"]
    content: TextOrBlocks


TurnBody = Annotated[
    Annotated[UserTurnBody, Tag(":user")]
    | Annotated[AssistantTurnBody, Tag(":assistant")]
    | Annotated[SystemTurnBody, Tag(":system")],
    _by("role"),
    _known("role", "user", "assistant", "system"),
]
AnyTurnBody = UserTurnBody | AssistantTurnBody | SystemTurnBody


def blocks_of(turn: AnyTurnBody, where: str) -> Iterator[tuple[str, Any]]:
    """The blocks of a turn, each with its path; a text stands for its block."""
    if isinstance(turn.content, str):
        yield f"{where}.content", TextBlockBody(type="text", text=turn.content)
        return
    for i, block in enumerate(turn.content):
        yield f"{where}.content[{i}]", block
