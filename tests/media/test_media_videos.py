"""Real videos, made here: which frames are seen, when, and what becomes of broken ones."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from fractions import Fraction

import av
import msgspec
import numpy as np
import pytest
from PIL import Image
from tests.media.site import LoaderMaker, PictureMaker, Site

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.films import process_film
from dashinfer_vlm.media.medium import MediaLimits
from dashinfer_vlm.media.types import MediaRef
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import Pixels, Processed, ProcessorConfig, process_frames, video_grid
from dashinfer_vlm.processors.videos import Qwen2Video, Sampling

RULE = Qwen2Video(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
CONFIG = ProcessorConfig(video=RULE)


def video(
    num_frames: int = 60,
    rate: int = 30,
    width: int = 112,
    height: int = 56,
    container: str = "mp4",
    codec: str = "libx264",
) -> bytes:
    """Frame n has the grey value of its place in time, so that it can be told which frames were taken."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb8" if codec == "gif" else "yuv420p"
        for n in range(num_frames):
            pixels = np.full((height, width, 3), round(n / num_frames * 200) + 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    return buffer.getvalue()


def process(data: bytes, config: ProcessorConfig = CONFIG, **limits: float | None) -> Processed:
    terms = Terms(
        config=config,
        sampling=Sampling(fps=limits.get("fps")),
        max_pixels=int(limits.get("max_pixels") or 10_000_000),
        max_video_s=limits.get("max_video_s") or 100.0,
    )
    return process_film(data, terms)


def shades(processed: Processed) -> list[float]:
    """Mean grey of each pair of frames."""
    return [float(part.mean()) for part in np.split(processed.features, processed.grid[0])]


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")],
)
def test_the_frames_of_every_container_are_sampled_evenly(container: str, codec: str) -> None:
    processed = process(video(container=container, codec=codec))
    chosen = RULE.choose(60, 30.0, Sampling(), 2)
    assert len(chosen) == 4
    assert processed.grid == video_grid(112, 56, 4, CONFIG)
    assert processed.seconds_per_grid == pytest.approx(1.0)
    expected = [n / 60 * 200 + 20 for n in chosen]
    pairs = [(expected[0] + expected[1]) / 2, (expected[2] + expected[3]) / 2]
    assert shades(processed) == pytest.approx(pairs, abs=4)


def test_the_rate_of_the_request_decides_how_many_frames_are_seen() -> None:
    data = video(num_frames=90)
    assert process(data, fps=4.0).grid[0] == 6
    assert process(data, fps=30.0).grid[0] == 45
    assert process(data, fps=0.001).grid[0] == 2, "never fewer than the processor's least"
    config = ProcessorConfig(video=msgspec.structs.replace(RULE, max_frames=10))
    assert process(data, config, fps=30.0).grid[0] == 5


def test_seconds_per_grid_follow_from_what_was_sampled() -> None:
    processed = process(video(num_frames=90), fps=4.0)
    assert processed.seconds_per_grid == pytest.approx(0.5)


def test_every_temporal_step_says_when_it_stands() -> None:
    processed = process(video(num_frames=90), fps=4.0)
    taken = [n * 90 // 12 / 30 for n in range(12)]
    assert processed.timestamps == pytest.approx([(taken[n] + taken[n + 1]) / 2 for n in range(0, 12, 2)])


def test_an_animated_gif_is_a_video_too() -> None:
    assert process(video(num_frames=12, rate=10, container="gif", codec="gif")).grid[0] == 2


def test_a_video_of_one_frame_is_a_pair_of_it() -> None:
    assert process(video(num_frames=1)).grid == (1, 4, 8)


def rotated(data: bytes) -> bytes:
    """The same mp4 with a display matrix of 90 degrees, as a phone held upright writes it."""
    upright = b"".join(n.to_bytes(4, "big", signed=True) for n in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    turned = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    track = data.index(b"tkhd")
    matrix = data.index(upright, track)
    return data[:matrix] + turned + data[matrix + len(turned) :]


def test_a_video_of_a_phone_held_upright_is_seen_upright() -> None:
    lying = video()
    assert process(lying).grid == (2, 4, 8)
    assert process(rotated(lying)).grid == (2, 8, 4)


def test_limits_of_time_and_pixels_are_checked_before_decoding() -> None:
    data = video(num_frames=90)
    with pytest.raises(MediaTooLargeError, match=r"lasts 3\.0 s; the limit is 2 s"):
        process(data, max_video_s=2.0)
    with pytest.raises(MediaTooLargeError, match="frames have 112x56 pixels"):
        process(data, max_pixels=1000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no video",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    ],
)
def test_what_is_no_video_or_names_other_files_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="not a video of a known container"):
        process(data)


def test_a_picture_and_a_sound_are_no_videos(picture: PictureMaker) -> None:
    with pytest.raises(MediaError, match="not a video"):
        process(picture())
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode()):
            output.mux(packet)
    with pytest.raises(MediaError, match="no video stream"):
        process(buffer.getvalue())


def test_a_video_that_breaks_off_gives_what_decodes() -> None:
    whole = video(num_frames=120, container="matroska")
    processed = process(whole[: len(whole) * 2 // 3], fps=8.0)
    assert 1 <= processed.grid[0] < process(whole, fps=8.0).grid[0]
    assert processed.features.shape[0] == np.prod(processed.grid)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("mpegts", "mpeg2video"), ("webm", "libvpx-vp9")])
def test_damaged_bytes_give_frames_or_a_media_error(container: str, codec: str) -> None:
    data = video(num_frames=20, container=container, codec=codec)
    rng = np.random.default_rng(0)
    for _ in range(12):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 20):
            damaged[position] = rng.integers(0, 256)
        with suppress(MediaError):  # any other exception fails the test
            assert process(bytes(damaged)).grid[0] >= 1


async def test_a_video_is_loaded_from_a_url_like_a_picture(site: Site, make_loader: LoaderMaker) -> None:
    data = video()
    loader = make_loader(CONFIG)
    expected = process(data)
    for source in (site.serve("/a.mp4", data), f"data:video/mp4;base64,{base64.b64encode(data).decode()}"):
        media = await loader.load(MediaRef(kind="video", source=source))
        assert np.array_equal(media.features.open(), expected.features)
        assert (media.kind, media.grid, media.seconds_per_grid) == ("video", expected.grid, 1.0)
        assert media.num_tokens == np.prod(expected.grid) // 4
        media.release()
    assert loader.counters.decodes == 1


def frames(num_frames: int, width: int = 56, height: int = 56) -> list[Pixels]:
    return [np.full((height, width, 3), n * 10, np.uint8) for n in range(num_frames)]


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


async def test_a_list_of_pictures_or_an_array_is_a_video(site: Site, make_loader: LoaderMaker) -> None:
    pictures = frames(5)
    expected = process_frames(pictures, CONFIG, num_frames=5, seconds_per_grid=1.0)
    loader = make_loader(CONFIG)
    sources: list[str | bytes] = [png(pixels) for pixels in pictures]
    sources[1] = site.serve("/1.png", png(pictures[1]))
    sources[2] = f"data:;base64,{base64.b64encode(png(pictures[2])).decode()}"
    for source in (tuple(sources), np.stack(pictures)):
        media = await loader.load(MediaRef(kind="video", source=source))
        assert media.grid == (3, 4, 4)
        assert np.array_equal(media.features.open(), expected.features)
        assert media.seconds_per_grid == 1.0
        assert media.timestamps == (0.25, 1.25, 2.0), "the last frame stands for two"
        media.release()
    media = await loader.load(MediaRef(kind="video", source=tuple(sources), fps=4.0))
    assert media.seconds_per_grid == 0.5
    assert loader.raw_bytes_free == MediaLimits().max_raw_bytes


async def test_what_a_request_asks_of_a_video_is_done_or_refused_by_name(make_loader: LoaderMaker) -> None:
    loader = make_loader(CONFIG)
    data = video(num_frames=90)

    async def grid(**fields: int | float) -> tuple[int, int, int]:
        media = await loader.load(MediaRef(kind="video", source=data, **fields))  # type: ignore[arg-type]
        media.release()
        assert len(media.timestamps) == media.grid[0]
        return media.grid

    assert await grid() == (3, 4, 8)
    assert await grid(num_frames=10) == (5, 4, 8)
    assert await grid(max_frames=4, fps=30.0) == (2, 4, 8)
    assert await grid(min_frames=12) == (6, 4, 8)
    assert await grid(resized_height=112, resized_width=56) == (3, 8, 4)
    assert await grid(total_pixels=3 * 28 * 28 * 2) == (3, 2, 4), "1568 pixels for each of three temporal steps"
    for fields, message in (
        ({"num_frames": 10, "fps": 2.0}, "fps and num_frames exclude each other"),
        ({"max_frames": 769}, "max_frames is 769; this server takes 1 to 768"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames 8 is above max_frames 4"),
        ({"resized_height": 56}, "go together"),
        ({"total_pixels": 0}, "total_pixels is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 1e-9}, "fps is 1e-09; it must be 1e-05 or more"),
    ):
        with pytest.raises(MediaError, match=message):
            await grid(**fields)


async def test_a_frame_that_cannot_be_used_is_named(make_loader: LoaderMaker, site: Site) -> None:
    loader = make_loader(CONFIG)
    good = png(frames(1)[0])
    with pytest.raises(MediaError, match="frame 1: this is not an image"):
        await loader.load(MediaRef(kind="video", source=(good, b"nothing", good)))
    with pytest.raises(MediaError, match="one size; these have 56x56 and 28x56"):
        await loader.load(MediaRef(kind="video", source=(good, png(frames(1, 28)[0]))))
    with pytest.raises(MediaError, match="status 404"):
        await loader.load(MediaRef(kind="video", source=(good, site.serve("/gone", b"", status=404))))
    assert loader.raw_bytes_free == MediaLimits().max_raw_bytes


async def test_too_many_or_too_heavy_frames_are_refused(make_loader: LoaderMaker) -> None:
    limits = MediaLimits(max_video_bytes=1000)
    loader = make_loader(ProcessorConfig(video=Qwen2Video(max_frames=8)), limits)
    with pytest.raises(MediaTooLargeError, match="a list of 9 frames; a video has 1 to 8"):
        await loader.load(MediaRef(kind="video", source=(b"x",) * 9))
    with pytest.raises(MediaTooLargeError, match="list of 0 frames"):
        await loader.load(MediaRef(kind="video", source=()))
    with pytest.raises(MediaTooLargeError, match="together larger than the limit of 1000 bytes"):
        await loader.load(MediaRef(kind="video", source=(bytes(600), bytes(600))))
    with pytest.raises(MediaTooLargeError, match="larger than the limit of 1000 bytes"):
        await loader.load(MediaRef(kind="video", source=bytes(1001)))


async def test_a_list_of_frames_is_no_image(make_loader: LoaderMaker) -> None:
    with pytest.raises(MediaError, match="a list of 2 frames"):
        await make_loader().load(MediaRef(kind="image", source=(b"x", b"y")))
