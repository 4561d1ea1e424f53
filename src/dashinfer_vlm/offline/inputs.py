"""What people write as conversations and images, brought into the form that all callers share.

A caller's own process is trusted: paths are read wherever they point. URLs stay under the media policy, since they
often come out of data sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from PIL import Image

from dashinfer_vlm.errors import InvalidRequestError, MediaError
from dashinfer_vlm.frontend.conversation import parse_messages, read_conversation
from dashinfer_vlm.frontend.messages import Message
from dashinfer_vlm.frontend.parts import OpenedMedia
from dashinfer_vlm.media.images import decode
from dashinfer_vlm.request import ItemKind

ImageLike: TypeAlias = "Image.Image | np.ndarray | str | Path | bytes"
"""A PIL image; uint8 [H, W], [H, W, 3] or [H, W, 4]; a URL (http, https, data, file) or a path; an encoded file."""
VideoLike: TypeAlias = "np.ndarray | str | Path | bytes | Sequence[ImageLike]"
"""uint8 [F, H, W, 3]; a URL or a path; an encoded file; or its frames, all of one size unless they are URLs."""
Conversation: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""A user's one message, or messages as in the HTTP API (docs/api.md), where `role` may be left out for a user's. Parts
of a content may also be images themselves (all but texts, which are text), and `{"type": "image", "image": ImageLike}`
or `{"type": "video", "video": VideoLike}`."""

Prompt: TypeAlias = "str | list[int]"
"""A text, or ids."""

_URL_SCHEMES = ("http://", "https://", "data:", "file://")


def to_messages(conversation: Conversation, bounds: tuple[int, int]) -> list[Message]:
    """`bounds` are the least and most pixels of an image here.

    Raises InvalidRequestError, and MediaError for a medium that cannot be read, with where it stands.
    """
    if isinstance(conversation, Mapping):
        raise InvalidRequestError("messages is one message; put it into a list", param="messages")
    if isinstance(conversation, str):
        return [Message(role="user", content=conversation)]
    opened = [_message(message, f"messages[{i}]") for i, message in enumerate(conversation)]
    return read_conversation(parse_messages(opened), bounds)


def is_conversation(value: Conversation | Sequence[Conversation]) -> bool:
    """Whether `value` is one conversation rather than a list of them."""
    if isinstance(value, str | Mapping):
        return True
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def as_sequence(value: object, name: str) -> Sequence[Any]:
    """`value`, which is called `name`; raises InvalidRequestError where it is none."""
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return value
    raise InvalidRequestError(f"{name} is a {type(value).__name__}; pass one, or a list", param=name)


def text_or_ids(prompt: Prompt) -> Prompt:
    """Ids may be those of numpy, one by one. Raises InvalidRequestError for anything else."""
    if isinstance(prompt, str):
        return prompt
    ids = as_sequence(prompt, "a prompt")
    if not all(isinstance(token, Integral) for token in ids):
        raise InvalidRequestError("a prompt is a text or a list of ids", param="prompts")
    return [int(token) for token in ids]


def _message(message: Any, where: str) -> Any:
    """Whatever is not a message is left to the parser, which says so."""
    if not isinstance(message, Mapping):
        return message
    fields: dict[str, Any] = {"role": "user", **message}
    content = fields.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        fields["content"] = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return fields


def _part(part: Any, where: str) -> Any:
    if isinstance(part, Image.Image | np.ndarray | Path | bytes):
        part = {"type": "image", "image": part}
    if not isinstance(part, Mapping):
        return part
    fields = dict(part)
    kind = fields.get("type")
    if kind in ("image", "video") and kind in fields:
        fields[kind] = _source(cast(ItemKind, kind), fields[kind], f"{where}.{kind}")
    return fields


def _source(kind: ItemKind, source: Any, where: str) -> str | list[str] | OpenedMedia:
    """A URL stays one, everything else is read."""
    if _is_url(source):
        return cast(str, source)
    if isinstance(source, Sequence) and source and all(map(_is_url, source)):
        return list(source)
    try:
        return OpenedMedia(_opened(kind, source))
    except (MediaError, OSError) as error:
        raise MediaError(f"{where}: {error}", param=where) from error


def _is_url(source: Any) -> bool:
    return isinstance(source, str) and source.startswith(_URL_SCHEMES)


def _opened(kind: ItemKind, source: Any) -> bytes | np.ndarray | tuple[str | bytes, ...]:
    if isinstance(source, Path):
        return source.read_bytes()
    if isinstance(source, str):
        return Path(source).expanduser().read_bytes()
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
    named = [isinstance(frame, str | bytes | Path) for frame in frames]
    if all(named):
        return tuple(frame if _is_url(frame) else cast(bytes, _opened("image", frame)) for frame in frames)
    if any(named):
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
        raise MediaError(
            f"a {type(image).__name__} is not an image; pass a PIL image, an array, a path, a URL or bytes"
        )
    return decode(image)
