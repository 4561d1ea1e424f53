"""OpenAI's conversations as JSON: one parser for HTTP, batch files and the offline API.

`parse_messages` (or a request's body) checks the form, `read_conversation` makes of it what the front end works with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.messages import MediaPart, Message, Part, TextPart, ToolCall
from dashinfer_vlm.frontend.parts import (
    AnyPart,
    ImageEmbedsBody,
    MediumBody,
    OpenedMedia,
    Options,
    PartBody,
    Rate,
    TextualBody,
)
from dashinfer_vlm.frontend.schema import Body, Positive, Whole, by_shape, explain, no_effect, only
from dashinfer_vlm.media.fetch import split_frames
from dashinfer_vlm.media.types import GivenEmbedding, MediaRef

LOW_DETAIL_PIXELS = 512 * 512
"""`detail: "low"`: the size that OpenAI documents for it."""

Content = Annotated[Annotated[str, Tag(":text")] | Annotated[list[AnyPart], Tag(":list")], by_shape]


class FunctionBody(Body):
    name: str
    arguments: str
    parsed_arguments: Annotated[Any, no_effect] = None
    """What OpenAI's client adds to an answer that it has parsed."""


class ToolCallBody(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionBody
    index: Whole | None = None


class MessageBody(Body):
    """A turn; answers of this API may be sent back as they came."""

    role: str
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    cache_control: Annotated[dict[str, Any] | None, no_effect] = None
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    parsed: Annotated[Any, no_effect] = None
    """What OpenAI's client adds to an answer that it has parsed."""
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same under OpenRouter's name."""


class ProcessorSize(Body):
    """Pixel bounds as the newer processors of `transformers` call them."""

    shortest_edge: Positive | None = None
    longest_edge: Positive | None = None


def _one_or_many(value: Any) -> str:
    return ":list" if isinstance(value, list) else ":number"


class ProcessorBody(Body):
    """`mm_processor_kwargs`: what holds for every image and video of a request that says nothing else."""

    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    size: ProcessorSize | None = None
    fps: (
        Annotated[Annotated[Rate, Tag(":number")] | Annotated[list[Rate], Tag(":list")], Discriminator(_one_or_many)]
        | None
    ) = None
    """Of every video, or of each in a list."""
    num_frames: Positive | None = None
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    do_resize: Annotated[Any, only(True)] = None
    do_sample_frames: bool | None = None
    """False only with videos that are lists of frames, which are all looked at."""

    def options(self) -> dict[str, Any]:
        """What holds for images and videos alike, by the names in MediaRef."""
        size = self.size or ProcessorSize()
        low, high = self.min_pixels or size.shortest_edge, self.max_pixels or size.longest_edge
        return _sent(min_pixels=low, max_pixels=high)

    def rates(self, num_videos: int) -> Sequence[float | None]:
        """`fps` of each video; raises InvalidRequestError for a list of another length."""
        if not isinstance(self.fps, list):
            return [self.fps] * num_videos
        if len(self.fps) != num_videos:
            raise InvalidRequestError(
                f"mm_processor_kwargs.fps has {len(self.fps)} rates, and there are {num_videos} videos",
                param="mm_processor_kwargs.fps",
            )
        return self.fps


def parse_messages(messages: object) -> list[MessageBody]:
    """The messages of a caller in this process, who may use OpenedMedia. Raises InvalidRequestError."""
    try:
        return _MESSAGES.validate_python(messages)
    except ValidationError as error:
        raise explain(error, "messages") from None


def read_conversation(
    messages: Sequence[MessageBody], bounds: tuple[int, int], processor: ProcessorBody | None = None
) -> list[Message]:
    """`bounds` are the least and most pixels of an image here. Raises InvalidRequestError."""
    reader = ContentReader([body.content for body in messages], bounds, processor)
    return [_message(body, reader, f"messages[{i}]") for i, body in enumerate(messages)]


_MESSAGES = TypeAdapter(list[MessageBody])


def _message(body: MessageBody, reader: ContentReader, where: str) -> Message:
    """`developer` is OpenAI's newer word for `system`."""
    if body.content is None and not body.tool_calls and body.role != "assistant":
        raise InvalidRequestError(f"{where}.content is missing", param=f"{where}.content")
    calls = (ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments) for c in body.tool_calls or ())
    return Message(
        role="system" if body.role == "developer" else body.role,
        content=reader.read(body.content, f"{where}.content"),
        name=body.name,
        reasoning=body.reasoning if body.reasoning_content is None else body.reasoning_content,
        tool_calls=tuple(calls),
        tool_call_id=body.tool_call_id,
    )


class ContentReader:
    """Reads the contents of one conversation, in their order."""

    def __init__(
        self,
        contents: Iterable[str | Sequence[PartBody] | None],
        bounds: tuple[int, int],
        processor: ProcessorBody | None = None,
    ) -> None:
        """`contents` are all that will be read, `bounds` the least and most pixels of an image here.

        Raises InvalidRequestError.
        """
        self._bounds = bounds
        self._processor = processor or ProcessorBody()
        parts = [part for content in contents if content and not isinstance(content, str) for part in content]
        num_videos = sum(isinstance(part, MediumBody) and part.kind == "video" for part in parts)
        self._rates: Iterator[float | None] = iter(self._processor.rates(num_videos))

    def read(self, content: str | Sequence[PartBody] | None, where: str) -> str | tuple[Part, ...]:
        """`where` is the path of the content; raises InvalidRequestError."""
        if content is None or isinstance(content, str):
            return content or ""
        return tuple(self.part(part, f"{where}[{i}]") for i, part in enumerate(content))

    def part(self, part: PartBody, where: str) -> Part:
        """The next of one content; as `read`."""
        if isinstance(part, MediumBody):
            return MediaPart(self._ref(part, where))
        if isinstance(part, ImageEmbedsBody):
            given = GivenEmbedding(part.image_embeds.image_embeds, part.image_embeds.image_grid_thw)
            return MediaPart(MediaRef(kind="image", source=given, param=f"{where}.image_embeds"))
        assert isinstance(part, TextualBody), part
        return TextPart(part.text)

    def _ref(self, part: MediumBody, where: str) -> MediaRef:
        source, path = _source(part, where)
        own = _own_options(part, where)
        options = self._processor.options() | own
        if part.kind == "video":
            options = self._video_options(own, source) | options
        elif _is_low_detail(part) and "max_pixels" not in own:
            least, most = self._bounds
            options["max_pixels"] = min(max(LOW_DETAIL_PIXELS, options.get("min_pixels", least)), most)
        return MediaRef(kind=part.kind, source=source, param=path, **options)

    def _video_options(self, own: dict[str, Any], source: object) -> dict[str, Any]:
        """Of the request; a video that says itself how many frames to take is not told again."""
        processor, rate = self._processor, next(self._rates)
        if processor.do_sample_frames is False and isinstance(source, str | bytes):
            raise UnsupportedError(
                "mm_processor_kwargs.do_sample_frames is false, and frames of a video file are always sampled; "
                "leave it out, or send the list of frames",
                param="mm_processor_kwargs.do_sample_frames",
            )
        if own.keys() & {"fps", "num_frames"}:
            return {}
        frames = {"min_frames": processor.min_frames, "max_frames": processor.max_frames}
        return _sent(fps=rate, num_frames=processor.num_frames, **frames)


def _sent(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _source(part: MediumBody, where: str) -> tuple[str | bytes | np.ndarray | tuple[str | bytes, ...], str]:
    """What MediaRef takes, and where it stands."""
    named, path = part.named(), f"{where}.{part.place}"
    if isinstance(named, Options):
        named, path = named.url, f"{path}.url"
    if isinstance(named, OpenedMedia):
        return named.source, path
    if isinstance(named, list):
        return tuple(named), path
    return (split_frames(named) if part.kind == "video" else None) or named, path


def _own_options(part: MediumBody, where: str) -> dict[str, Any]:
    """Those beside and those inside the medium; raises InvalidRequestError where they contradict each other."""
    beside, named = part.sent(), part.named()
    inside = named.sent() if isinstance(named, Options) else {}
    for name in beside.keys() & inside.keys():
        if beside[name] != inside[name]:
            raise InvalidRequestError(
                f"{where}.{name} is {beside[name]}, and {inside[name]} inside {part.place}; send one of them",
                param=f"{where}.{name}",
            )
    return beside | inside


def _is_low_detail(part: MediumBody) -> bool:
    return "low" in (getattr(part, "detail", None), getattr(part.named(), "detail", None))
