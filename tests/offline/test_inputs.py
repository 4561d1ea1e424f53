"""Conversations as people write them: what is meant is understood, what is not is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm.errors import InvalidRequestError, MediaError
from dashinfer_vlm.frontend.messages import MediaPart, Message, TextPart
from dashinfer_vlm.offline.inputs import Conversation, is_conversation
from dashinfer_vlm.offline.inputs import to_messages as read


def to_messages(conversation: Conversation) -> list[Message]:
    return read(conversation, (1000, 1_000_000))


def user(*content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def test_a_string_is_a_user_message() -> None:
    assert to_messages("Hi") == [Message(role="user", content="Hi")]


def test_parts_keep_their_order_and_their_place() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    [message] = to_messages(user("a", image, {"type": "text", "text": "b"}))
    assert isinstance(message.content, tuple)
    assert message.content[0] == TextPart("a")
    assert message.content[2] == TextPart("b")
    assert isinstance(message.content[1], MediaPart)
    ref = message.content[1].ref
    assert isinstance(ref.source, np.ndarray)
    assert (ref.kind, ref.source.shape, ref.param) == ("image", (1, 4, 6, 3), "messages[0].content[1].image")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_every_mode_of_an_image_becomes_rgb(mode: str) -> None:
    [message] = to_messages(user(Image.new(mode, (6, 4))))
    [ref] = message.refs
    assert isinstance(ref.source, np.ndarray)
    assert ref.source.shape == (1, 4, 6, 3)


def test_urls_are_left_to_the_media_room() -> None:
    urls = ["https://example.org/a.png", "data:image/png;base64,AA==", "file:///a.png"]
    [message] = to_messages(user(*[{"type": "image_url", "image_url": {"url": url}} for url in urls]))
    assert [ref.source for ref in message.refs] == urls


def test_options_of_a_medium_reach_its_reference() -> None:
    part = {"type": "video", "video": ("data:,a", "data:,b"), "fps": 2.0, "max_pixels": 9}
    [ref] = to_messages(user(part))[0].refs
    assert (ref.source, ref.fps, ref.max_pixels) == (("data:,a", "data:,b"), 2.0, 9)


def test_one_conversation_is_told_from_a_list() -> None:
    assert is_conversation("Hi")
    assert is_conversation(user("Hi"))
    assert is_conversation({"role": "user", "content": "Hi"})  # type: ignore[arg-type]  # which is refused
    assert not is_conversation(["Hi"])
    assert not is_conversation([user("Hi")])
    assert not is_conversation([])


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ([5], InvalidRequestError, r"messages\[0\]: input should be an object"),
        ({"role": "user", "content": "Hi"}, InvalidRequestError, "messages is one message; put it into a list"),
        ([{"role": "user", "text": "Hi"}], InvalidRequestError, r"messages\[0\].text is not a field"),
        ([{"role": "user", "content": 5}], InvalidRequestError, "wrong type"),
        ([{"role": "user", "content": {"type": "text"}}], InvalidRequestError, "wrong type"),
        (user(5), InvalidRequestError, r"content\[0\] has the wrong type, number"),
        (user({"type": "audio"}), InvalidRequestError, "has type 'audio'"),
        (user({"type": "text"}), InvalidRequestError, r"text is missing"),
        (user({"type": "text", "text": 5}), InvalidRequestError, r"text: input should be a valid string"),
        (user({"type": "image"}), InvalidRequestError, r"image is missing"),
        (user({"type": "image", "image": "data:,", "size": 5}), InvalidRequestError, r"size is not a field"),
        (user({"type": "image_url", "image_url": {"uri": "x"}}), InvalidRequestError, r"image_url.url is missing"),
        (user({"type": "image", "image": 5}), MediaError, "a int is not an image"),
        (user({"type": "image", "image": None}), MediaError, "a NoneType is not an image"),
        (user(np.zeros((3, 4, 6), np.uint8)), MediaError, "must be uint8"),
        (user(np.zeros((4, 6, 3), np.float32)), MediaError, "must be uint8"),
        (user({"type": "video", "video": 5}), MediaError, "a int is no video"),
        (user({"type": "video", "video": []}), MediaError, "no frames"),
        (user({"type": "video", "video": ["data:,", np.zeros((4, 4, 3), np.uint8)]}), MediaError, "either all"),
        (
            user({"type": "video", "video": [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)]}),
            MediaError,
            "different sizes: 4x4, 6x4",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(conversation: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_messages(conversation)
