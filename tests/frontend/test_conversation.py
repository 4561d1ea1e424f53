"""Conversations as OpenAI, Qwen and vLLM write them: what has one meaning is understood, anything else is named."""

from __future__ import annotations

from typing import Any

import pytest

from dashinfer_vlm.errors import InvalidRequestError, UnsupportedError
from dashinfer_vlm.frontend.conversation import ProcessorBody, parse_messages, read_conversation
from dashinfer_vlm.frontend.messages import Message, TextPart
from dashinfer_vlm.media.types import MediaRef

BOUNDS = (1000, 1_000_000)
URL = "https://host/one"
FRAMES = ("data:image/jpeg;base64,AAAA", "data:image/jpeg;base64,BBBB")


def read(*messages: Any, processor: dict[str, Any] | None = None) -> list[Message]:
    kwargs = None if processor is None else ProcessorBody.model_validate(processor)
    return read_conversation(parse_messages(list(messages)), BOUNDS, kwargs)


def refs(*parts: Any, processor: dict[str, Any] | None = None) -> list[MediaRef]:
    [message] = read({"role": "user", "content": list(parts)}, processor=processor)
    return list(message.refs)


def told(ref: MediaRef) -> dict[str, Any]:
    """What a reference says beyond what it must."""
    names = (name for name in MediaRef.__slots__ if name not in ("kind", "source", "param"))
    return {name: value for name in names if (value := getattr(ref, name)) is not None}


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, "image_url.url"),
        ({"type": "image_url", "image_url": URL}, "image_url"),
        ({"type": "image", "image": URL}, "image"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "original"}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": None}, "uuid": None}, "image_url.url"),
        ({"type": "image_url", "image_url": URL, "cache_control": {"type": "ephemeral"}}, "image_url"),
        ({"type": "video_url", "video_url": {"url": URL}}, "video_url.url"),
        ({"type": "video_url", "video_url": URL, "fps": None}, "video_url"),
        ({"type": "video", "video": URL}, "video"),
    ],
)
def test_a_medium_is_known_in_every_form_that_people_send(part: dict[str, Any], path: str) -> None:
    [ref] = refs(part)
    assert (ref.kind, ref.source, told(ref)) == (part["type"].removesuffix("_url"), URL, {})
    assert ref.param == f"messages[0].content[0].{path}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": list(FRAMES)},
        {"type": "video", "video": "data:video/jpeg;base64,AAAA,BBBB"},
        {"type": "video_url", "video_url": "data:video/jpeg;base64,AAAA,BBBB"},
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA,BBBB"}},
    ],
)
def test_a_video_may_be_the_list_of_its_frames(part: dict[str, Any]) -> None:
    [ref] = refs(part)
    assert (ref.kind, ref.source) == ("video", FRAMES)


PIXELS = {"min_pixels": 2000, "max_pixels": 5000, "resized_height": 280, "resized_width": 420}
SAMPLING = {"fps": 2.0, "min_frames": 4, "max_frames": 8, "total_pixels": 90_000}


@pytest.mark.parametrize("form", ["image_url", "image", "video_url", "video"])
def test_options_stand_inside_or_beside_a_medium(form: str) -> None:
    options = PIXELS if form.startswith("image") else PIXELS | SAMPLING
    assert told(*refs({"type": form, form: URL, **options})) == options
    if form.endswith("url"):
        assert told(*refs({"type": form, form: {"url": URL, **options}})) == options
        assert told(*refs({"type": form, form: {"url": URL, **options}, **options})) == options


def test_options_that_contradict_each_other_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"max_pixels is 4000, and 5000 inside image_url; send one") as caught:
        refs({"type": "image_url", "image_url": {"url": URL, "max_pixels": 5000}, "max_pixels": 4000})
    assert caught.value.param == "messages[0].content[0].max_pixels"


def test_a_rate_may_be_a_list_of_one_and_frames_have_qwens_name_too() -> None:
    [one, two] = refs({"type": "video", "video": URL, "fps": [2]}, {"type": "video", "video": URL, "nframes": 16.0})
    assert (told(one), told(two)) == ({"fps": 2}, {"num_frames": 16})


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, [{}, {}, {}]),
        ({"min_pixels": 2000, "max_pixels": 3000}, [{"min_pixels": 2000, "max_pixels": 3000}] * 3),
        ({"size": {"longest_edge": 3000}}, [{"max_pixels": 3000}] * 3),
        ({"fps": 3}, [{}, {"fps": 3}, {"fps": 3}]),
        ({"fps": [3, 0.5], "do_sample_frames": True}, [{}, {"fps": 3}, {"fps": 0.5}]),
        ({"num_frames": 8, "do_resize": True}, [{}, {"num_frames": 8}, {"num_frames": 8}]),
    ],
)
def test_processor_arguments_hold_for_all_media_of_a_request(
    processor: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    found = refs(
        {"type": "image", "image": URL},
        {"type": "video", "video": URL},
        {"type": "video", "video": URL},
        processor=processor,
    )
    assert [told(ref) for ref in found] == expected


def test_a_mediums_own_options_go_before_the_requests() -> None:
    processor = {"max_pixels": 3000, "fps": 1, "max_frames": 9}
    [image, video] = refs(
        {"type": "image", "image": URL, "max_pixels": 2000},
        {"type": "video", "video": URL, "num_frames": 8},
        processor=processor,
    )
    assert (told(image), told(video)) == ({"max_pixels": 2000}, {"max_pixels": 3000, "num_frames": 8})


def test_rates_for_another_number_of_videos_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="has 2 rates, and there are 1 videos"):
        refs({"type": "video", "video": URL}, processor={"fps": [1, 2]})


def test_only_frames_need_no_sampling() -> None:
    assert told(*refs({"type": "video", "video": list(FRAMES)}, processor={"do_sample_frames": False})) == {}
    with pytest.raises(UnsupportedError, match="always sampled"):
        refs({"type": "video", "video": URL}, processor={"do_sample_frames": False})


@pytest.mark.parametrize("beside", [True, False])
def test_low_detail_bounds_the_pixels_unless_they_are_bounded(beside: bool) -> None:
    def ref(**options: Any) -> MediaRef:
        low = {"detail": "low"}
        part = {"type": "image_url", "image_url": URL, **low} if beside else {}
        [found] = refs(part or {"type": "image_url", "image_url": {"url": URL} | low} | options, processor=options)
        return found

    assert ref().max_pixels == 512 * 512
    assert ref(min_pixels=300_000).max_pixels == 300_000


def test_texts_stand_for_their_parts() -> None:
    [message] = read({"role": "user", "content": ["a", {"type": "text", "text": "b", "cache_control": None}]})
    assert message.content == (TextPart("a"), TextPart("b"))


def test_a_name_may_be_written_in_any_script() -> None:
    [message] = read({"role": "user", "content": "hi", "name": "Søren 李", "cache_control": {"type": "ephemeral"}})
    assert message.name == "Søren 李"


def test_optional_fields_may_be_null() -> None:
    nulls = dict.fromkeys(["name", "tool_calls", "tool_call_id", "refusal", "annotations", "audio", "function_call"])
    assert read({"role": "assistant", "content": None, **nulls}) == [Message(role="assistant")]
    call = {"type": None, "id": None, "index": None, "function": {"name": "f", "arguments": "{}"}}
    [message] = read({"role": "assistant", "content": None, "tool_calls": [call]})
    assert [call.name for call in message.tool_calls] == ["f"]


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        ({"text": "x"}, ".type", 'has no type; a part is {"type": "text", "text": ...} or {"type": "image_url"'),
        ({"type": "sound"}, ".type", "has type 'sound'; supported are text, image_url, video_url, image, video"),
        ({"type": {}}, ".type", "has type '{}'"),
        (None, "", "has the wrong type, null; a part is text or an object"),
        ({"type": "image_url", "image_url": 5}, ".image_url", "has the wrong type, number"),
        ({"type": "image", "image": [URL]}, ".image", "has the wrong type, array"),
        ({"type": "image", "image": URL, "fps": 2}, ".fps", "is not a field"),
        ({"type": "video", "video": [5]}, ".video[0]", "valid string"),
        ({"type": "video", "video": []}, ".video", "at least 1 item"),
        ({"type": "video", "video": URL, "fps": [1, 2]}, ".fps", "valid number"),
        ({"type": "video", "video": URL, "fps": float("nan")}, ".fps", "finite number"),
        ({"type": "video", "video": URL, "num_frames": 8, "nframes": 8}, ".nframes", "is not a field"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "Ultra"}}, ".image_url.detail", "(it is 'Ultra')"),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_path(part: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        refs(part)
    assert caught.value.param == f"messages[0].content[0]{param}"
    assert message in str(caught.value)
