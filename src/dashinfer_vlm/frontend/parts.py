"""The parts of a message's content as JSON: OpenAI's, and what users of Qwen and vLLM write instead.

A medium may be named in OpenAI's form (`{"type": "image_url", "image_url": {"url": ...}}`) or in that of Qwen's recipes
(`{"type": "image", "image": ...}`); its options may stand inside or beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, Tag
from pydantic.json_schema import SkipJsonSchema

from dashinfer_vlm.frontend.schema import Body, Positive, by_shape, json_type, meant, no_effect, unsupported
from dashinfer_vlm.request import ItemKind

_PIXEL_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_VIDEO_OPTIONS = ("total_pixels", "fps", "num_frames", "min_frames", "max_frames")
FORMS = {
    "text": '{"type": "text", "text": ...}',
    "image_url": '{"type": "image_url", "image_url": {"url": ...}}',
    "video_url": '{"type": "video_url", "video_url": {"url": ...}}',
    "image": '{"type": "image", "image": URL}',
    "video": '{"type": "video", "video": URL or list of URLs}',
    "image_embeds": '{"type": "image_embeds", "image_embeds": {"image_embeds": ..., "image_grid_thw": ...}}',
}
"""The parts of a content, by type."""


@dataclass(frozen=True, slots=True)
class OpenedMedia:
    """A medium that the caller's own process has read already. JSON cannot hold one, so no request can name one."""

    source: bytes | np.ndarray | tuple[str | bytes, ...]
    """As in MediaRef."""


Source: TypeAlias = str | list[str] | OpenedMedia


def _lone(value: Any) -> Any:
    """`qwen_vl_utils` writes the rate of its one video as a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _form_of_source(value: Any) -> str | None:
    if isinstance(value, str):
        return ":text"
    if isinstance(value, list):
        return ":list"
    return ":opened" if isinstance(value, OpenedMedia) else None


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Url = Annotated[str, Tag(":text")]
_Frames = Annotated[list[str], Field(min_length=1), Tag(":list")]
_Opened = Annotated[Any, Tag(":opened"), SkipJsonSchema()]
_by_form = Discriminator(_form_of_source)


class Options(Body):
    """How large an image, or the frames of a video, are to be."""

    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    resized_height: Positive | None = None
    resized_width: Positive | None = None

    def sent(self) -> dict[str, Any]:
        """The options that were sent, by their names in MediaRef."""
        names = (*_PIXEL_OPTIONS, *_VIDEO_OPTIONS)
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


class ImageOptions(Options):
    detail: Literal["auto", "low", "high", "original"] | None = None
    """All but "low" mean the size that the pixel bounds give."""


class VideoOptions(Options):
    """... and which of its frames are looked at."""

    fps: Annotated[Rate | None, BeforeValidator(_lone)] = None
    num_frames: Positive | None = Field(None, validation_alias=AliasChoices("num_frames", "nframes"))
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    total_pixels: Positive | None = None


class ImageUrl(ImageOptions):
    url: str


class VideoUrl(VideoOptions):
    url: str


class PartBody(Body):
    cache_control: Annotated[dict[str, Any] | None, no_effect] = None
    """Of Anthropic's API; no effect, since prefixes are cached without being asked."""
    prompt_cache_breakpoint: Annotated[dict[str, Any] | None, no_effect] = None
    """The same in OpenAI's."""


class TextualBody(PartBody):
    """A text, whatever an API calls it."""

    type: str
    text: str


class TextBody(TextualBody):
    type: Literal["text"]


class MediumBody(PartBody, Options):
    """An image or a video, in either form."""

    kind: ClassVar[ItemKind]

    type: str
    uuid: Annotated[str | None, no_effect] = None
    """Accepted; identity here is the content itself."""

    @property
    def place(self) -> str:
        """The field that names it."""
        return self.type

    def named(self) -> Source | ImageUrl | VideoUrl:
        """What stands there."""
        raise NotImplementedError


class ImageUrlBody(MediumBody, ImageOptions):
    kind = "image"
    type: Literal["image_url"]
    image_url: Annotated[_Url | Annotated[ImageUrl, Tag(":object")], by_shape]

    def named(self) -> str | ImageUrl:
        return self.image_url


class VideoUrlBody(MediumBody, VideoOptions):
    kind = "video"
    type: Literal["video_url"]
    video_url: Annotated[_Url | Annotated[VideoUrl, Tag(":object")], by_shape]

    def named(self) -> str | VideoUrl:
        return self.video_url


class ImageBody(MediumBody, ImageOptions):
    kind = "image"
    type: Literal["image"]
    image: Annotated[_Url | _Opened, _by_form]

    def named(self) -> Source:
        return self.image


class VideoBody(MediumBody, VideoOptions):
    """A video, or the list of its frames."""

    kind = "video"
    type: Literal["video"]
    video: Annotated[_Url | _Frames | _Opened, _by_form]

    def named(self) -> Source:
        return self.video


class Embeds(Body):
    """Safetensors files of one tensor each, in base64."""

    image_embeds: str
    image_grid_thw: str


class ImageEmbedsBody(PartBody):
    """An image that was encoded elsewhere, as in vLLM, but for the files' format."""

    type: Literal["image_embeds"]
    image_embeds: Embeds
    uuid: Annotated[str | None, no_effect] = None
    """Accepted; identity here is the content itself."""


_DOCUMENTS = ("document", "file", "input_file")


def instead_of(kind: object) -> str:
    """What to send instead of a part that other servers take; the end of a sentence."""
    return "; send a document's text, or its pages as pictures" if kind in _DOCUMENTS else ""


def one_of(forms: Mapping[str, str]) -> BeforeValidator:
    """Parts that say by their type which of `forms` they have; a text may stand for its part."""

    def checked(value: Any) -> Any:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        if not isinstance(value, dict):
            raise meant(f"has the wrong type, {json_type(value)}; a part is text or an object")
        if "type" not in value:
            raise meant(f"has no type; a part is {' or '.join(forms.values())}", field="type")
        if not isinstance(value["type"], str) or value["type"] not in forms:
            told = f"has type {str(value['type'])[:80]!r}; supported are {', '.join(forms)}"
            raise unsupported(told + instead_of(value["type"]), field="type")
        return value

    return BeforeValidator(checked)


def _type_of_part(part: dict[str, Any]) -> str:
    return f":{part['type']}"


by_type = Discriminator(_type_of_part)
"""Tells parts apart that are tagged `:TYPE`."""

ChatPart = (
    Annotated[TextBody, Tag(":text")]
    | Annotated[ImageUrlBody, Tag(":image_url")]
    | Annotated[VideoUrlBody, Tag(":video_url")]
    | Annotated[ImageBody, Tag(":image")]
    | Annotated[VideoBody, Tag(":video")]
    | Annotated[ImageEmbedsBody, Tag(":image_embeds")]
)
AnyPart = Annotated[ChatPart, by_type, one_of(FORMS)]
