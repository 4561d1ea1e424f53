"""What the encoder has no memory for is refused by its header, before it is decoded."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tests.media.site import LoaderMaker, PictureMaker
from tests.media.test_media_videos import video

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media import images
from dashinfer_vlm.media.decode import answer
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.media.wire import DecodeJob, Failed, Terms
from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.processors.videos import Qwen2Video

CONFIG = ProcessorConfig(video=Qwen2Video(min_pixels=28 * 28, max_pixels=28 * 28 * 16))
SIX_BY_FOUR = 6 * 4
"""Patches of a picture of 84 x 56."""


async def test_a_picture_is_refused_by_its_size_and_a_smaller_one_is_taken(
    make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader(CONFIG)
    loader.max_patches = SIX_BY_FOUR
    (await loader.load(MediaRef(kind="image", source=picture(84, 56)))).release()
    with pytest.raises(MediaTooLargeError) as caught:
        await loader.load(MediaRef(kind="image", source=picture(168, 112), param="messages.0"))
    assert str(caught.value) == (
        "the image is encoded as 168x112 pixels, 96 patches; there is memory for 24; "
        "send a smaller one, or a lower max_pixels"
    )
    assert caught.value.param == "messages.0"


async def test_a_lower_max_pixels_makes_the_same_picture_fit(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    loader = make_loader(CONFIG)
    loader.max_patches = SIX_BY_FOUR
    (await loader.load(MediaRef(kind="image", source=picture(168, 112), max_pixels=84 * 56))).release()


async def test_arrays_frames_and_videos_are_held_to_it_too(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    loader = make_loader(CONFIG)
    loader.max_patches = SIX_BY_FOUR
    refused = [
        MediaRef(kind="image", source=np.zeros((1, 112, 168, 3), np.uint8)),
        MediaRef(kind="video", source=np.zeros((4, 56, 84, 3), np.uint8)),
        MediaRef(kind="video", source=tuple(picture(84, 56, seed=n) for n in range(4))),
        MediaRef(kind="video", source=video(num_frames=60)),
    ]
    for ref in refused:
        with pytest.raises(MediaTooLargeError, match=rf"the {ref.kind} is encoded as .* there is memory for 24"):
            await loader.load(ref)
    (await loader.load(MediaRef(kind="video", source=np.zeros((2, 56, 84, 3), np.uint8)))).release()


async def test_without_an_engine_there_is_no_limit(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    (await make_loader(CONFIG).load(MediaRef(kind="image", source=picture(1000, 800)))).release()


def test_the_header_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def decoded(image: Image.Image) -> None:
        raise MediaError("pixels were decoded")

    monkeypatch.setattr(images, "decode", decoded)
    data = io.BytesIO()
    Image.new("RGB", (168, 112)).save(data, "PNG")
    job = DecodeJob(
        kind="image",
        sources=(data.getvalue(),),
        terms=Terms(config=CONFIG, max_pixels=1_000_000, max_video_s=60.0, max_patches=SIX_BY_FOUR),
        folder=str(tmp_path),
        name="features",
    )
    reply = answer(job)
    assert isinstance(reply, Failed)
    assert (reply.kind, "96 patches" in reply.message) == ("too_large", True)
