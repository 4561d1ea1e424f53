"""What people write as conversations and images, brought into the front end's form.

A caller's own process is trusted: paths are read wherever they point. URLs stay under the media policy, since they
often come out of data sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from PIL import Image

from dashinfer_vlm.errors import InvalidRequestError, MediaError
from dashinfer_vlm.frontend.messages import MediaPart, Message, Part, TextPart
from dashinfer_vlm.media.images import decode
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.request import ItemKind

ImageLike: TypeAlias = "Image.Image | np.ndarray | str | Path | bytes"
"""A PIL image; uint8 [H, W], [H, W, 3] or [H, W, 4]; a URL (http, https, data, file) or a path; an encoded file."""
VideoLike: TypeAlias = "np.ndarray | str | Path | bytes | Sequence[ImageLike]"
"""uint8 [F, H, W, 3]; a URL or a path; an encoded file; or its frames, all of one size unless they are URLs."""
Conversation: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""A user's one message, or messages with `role` and `content` as in the OpenAI API. Parts of a content may also be
strings, PIL images, arrays, and `{"type": "image", "image": ImageLike}` or `{"type": "video", "video": VideoLike}`."""

_URL_SCHEMES = ("http://", "https://", "data:", "file://")
_MESSAGE_FIELDS = {"role", "content", "name"}
_REF_FIELDS = {"min_pixels", "max_pixels", "fps"}


def to_messages(conversation: Conversation) -> list[Message]:
    """Raises InvalidRequestError, and MediaError for a medium that cannot be read, with where it stands."""
    if isinstance(conversation, str):
        return [Message(role="user", content=conversation)]
    return [_message(message, f"messages[{i}]") for i, message in enumerate(conversation)]


def is_conversation(value: Conversation | Sequence[Conversation]) -> bool:
    """Whether `value` is one conversation rather than a list of them."""
    return isinstance(value, str) or (len(value) > 0 and isinstance(value[0], Mapping))


def _message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} is a {type(message).__name__}; it must be a dict", param=where)
    _check_fields(message, _MESSAGE_FIELDS, where)
    content = message.get("content", "")
    if not isinstance(content, str):
        if isinstance(content, Mapping) or not isinstance(content, Sequence):
            raise InvalidRequestError(f"{where}.content must be text or a list of parts", param=f"{where}.content")
        content = tuple(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    return Message(role=message.get("role", "user"), content=content, name=message.get("name"))


def _part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if isinstance(part, Image.Image | np.ndarray):
        return MediaPart(_ref("image", part, {}, where))
    if not isinstance(part, Mapping):
        raise InvalidRequestError(
            f"{where} is a {type(part).__name__}; it must be text, an image or a dict", param=where
        )
    kind = part.get("type")
    if kind == "text":
        _check_fields(part, {"type", "text"}, where)
        if not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}.text is missing or no text", param=where)
        return TextPart(part["text"])
    if kind in ("image", "video"):
        return _medium(kind, part, kind, where)
    if kind in ("image_url", "video_url"):
        return _medium(cast(ItemKind, kind.removesuffix("_url")), part, kind, where)
    raise InvalidRequestError(
        f"{where}.type is {kind!r}; it must be one of text, image, video, image_url, video_url", param=where
    )


def _medium(kind: ItemKind, part: Mapping[str, Any], field: str, where: str) -> MediaPart:
    """`{"type": "image", "image": source, "max_pixels": ...}`, or the OpenAI form with `{"url": ...}` inside."""
    if field not in part:
        raise InvalidRequestError(f"{where} has no field {field!r}", param=where)
    source, options = part[field], {name: part[name] for name in part if name not in ("type", field)}
    if field.endswith("_url"):
        inner: dict[str, Any] = dict(source) if isinstance(source, Mapping) else {"url": source}
        inner.pop("detail", None)  # OpenAI's hint; images always keep the size that the pixel limits give them
        source, options = inner.pop("url", None), options | inner
        if not isinstance(source, str) or not source.startswith(_URL_SCHEMES):
            raise InvalidRequestError(f"{where}.{field} is no URL; use type {kind!r} for other sources", param=where)
    _check_fields(options, _REF_FIELDS, where)
    return MediaPart(_ref(kind, source, options, where))


def _ref(kind: ItemKind, source: Any, options: Mapping[str, Any], where: str) -> MediaRef:
    try:
        return MediaRef(kind=kind, source=_source(kind, source), param=where, **options)
    except (MediaError, OSError) as error:
        raise MediaError(f"{where}: {error}", param=where) from error


def _source(kind: ItemKind, source: Any) -> str | bytes | np.ndarray | tuple[str | bytes, ...]:
    if isinstance(source, Path):
        return source.read_bytes()
    if isinstance(source, str):
        return source if source.startswith(_URL_SCHEMES) else Path(source).expanduser().read_bytes()
    if isinstance(source, bytes):
        return source
    if kind == "image":
        return _rgb(source)[None]
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, Sequence):
        return _frames(source)
    raise MediaError(f"a {type(source).__name__} is no {kind}")


def _frames(frames: Sequence[Any]) -> np.ndarray | tuple[str | bytes, ...]:
    if not frames:
        raise MediaError("a video has no frames")
    named = [frame for frame in frames if isinstance(frame, str | bytes | Path)]
    if len(named) == len(frames):
        return tuple(cast("str | bytes", _source("image", frame)) for frame in named)
    if named:
        raise MediaError("the frames of a video are either all decoded or all named")
    images = [_rgb(frame) for frame in frames]
    sizes = sorted({f"{image.shape[1]}x{image.shape[0]}" for image in images})
    if len(sizes) != 1:
        raise MediaError(f"the frames of a video have different sizes: {', '.join(sizes)}")
    return np.stack(images)


def _rgb(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] by the rules of the media room: upright, transparency on white."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise MediaError(
                f"an image array must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {image.dtype} {list(image.shape)}"
            )
        if image.ndim == 3 and image.shape[2] == 3:
            return image
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise MediaError(f"a {type(image).__name__} is no image; give a PIL image, an array, a path, a URL or bytes")
    return decode(image)


def _check_fields(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in fields:
        if name not in known:
            raise InvalidRequestError(
                f"{where} has an unknown field {name!r}; known are {', '.join(sorted(known))}", param=where
            )
