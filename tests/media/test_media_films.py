"""Real films: which frames are taken and when they stand, in whatever container, codec, rhythm and condition."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
from tests.media.film_maker import CONFIG, film, numbers, process

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.timeline import timeline
from dashinfer_vlm.processors.qwen import Processed, ProcessorConfig
from dashinfer_vlm.processors.videos import Qwen3Video, Sampling

KINDS = [
    ("mp4", "libx264"),
    ("matroska", "libx264"),
    ("mpegts", "libx264"),
    ("mp4", "libx265"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libsvtav1"),
    ("avi", "mpeg4"),
    ("mp4", "mpeg4"),
    ("mpegts", "mpeg2video"),
    ("mpeg", "mpeg1video"),
    ("mov", "mjpeg"),
    ("mov", "prores_ks"),
    ("flv", "flv"),
    ("gif", "gif"),
]
FAST = {
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "11", "svtav1-params": "enable-tpl-la=0"},
    "libvpx": {"deadline": "realtime"},
}
QWEN3 = ProcessorConfig(patch_size=14, video=Qwen3Video(min_pixels=28 * 28))


@pytest.mark.parametrize(("container", "codec"), KINDS)
def test_the_wanted_frames_of_every_container_and_codec_are_taken(container: str, codec: str) -> None:
    processed = process(film(75, container=container, codec=codec, options=FAST.get(codec)), num_frames=10)
    taken = [n * 75 // 10 for n in range(10)]
    assert numbers(processed) == taken
    assert processed.timestamps == pytest.approx([(a + b) / 50 for a, b in zip(taken[::2], taken[1::2], strict=True)])
    assert processed.seconds_per_grid == pytest.approx(0.6)


@pytest.mark.parametrize("rate", [10.0, 23.976, 29.97, 60.0])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
def test_time_stamps_that_a_container_rounds_make_no_film_uneven(container: str, rate: float) -> None:
    processed = process(film(90, rate=rate, container=container))
    taken = CONFIG.video.choose(90, rate, Sampling(), 2)
    assert numbers(processed) == taken
    assert processed.timestamps == pytest.approx(
        [(a + b) / 2 / rate for a, b in zip(taken[::2], taken[1::2], strict=True)], rel=1e-3
    )


@pytest.mark.parametrize(
    "options",
    [
        {"bf": "0"},
        {"bf": "3", "b-pyramid": "normal"},
        {"x264-params": "open-gop=1:keyint=20:bframes=4:log-level=none"},
        {"x264-params": "keyint=infinite:log-level=none"},
        {"x264-params": "intra-refresh=1:log-level=none"},
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_any_single_frame_is_the_one_that_decoding_everything_gives(container: str, options: dict[str, str]) -> None:
    data = film(120, container=container, options=options, gop=20)
    whole = process(data, fps=25.0)
    assert numbers(whole) == list(range(120))
    for count in (4, 6, 14, 34):
        taken = [n * 120 // count for n in range(count)]
        processed = process(data, num_frames=count)
        assert numbers(processed) == taken
        assert np.array_equal(_frames(processed), _frames(whole)[taken])


def _frames(processed: Processed) -> np.ndarray:
    steps, rows, columns = processed.grid
    cut = processed.features.reshape(steps, rows * columns, 3, 2, 14, 14)
    return np.asarray(cut.transpose(0, 3, 1, 2, 4, 5)).reshape(2 * steps, -1)


@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_a_last_scene_that_stands_for_long_makes_a_film_long(container: str) -> None:
    """Ten frames in the first second, then one that stands for 19 s: 20 s, of which half a second is one step."""
    data = film([n / 10 for n in range(11)], rate=10, container=container, last_s=19.0)
    processed = process(data)
    assert processed.grid[0] == 20
    assert processed.seconds_per_grid == pytest.approx(1.0)
    assert processed.timestamps == pytest.approx([n + 0.25 for n in range(20)])
    assert numbers(processed) == [0, 5, *[10] * 38]


@pytest.mark.parametrize("container", ["mp4", "matroska", "webm"])
def test_frames_of_variable_rate_are_taken_by_their_own_times(container: str) -> None:
    times = [*(n / 10 for n in range(20)), *(2 + n for n in range(8)), *(10 + n / 10 for n in range(20))]
    codec = "libvpx-vp9" if container == "webm" else "libx264"
    processed = process(film(times, rate=10, container=container, codec=codec), num_frames=24)
    newest = [max(n for n, t in enumerate(times) if t <= moment / 2 + 1e-6) for moment in range(24)]
    assert numbers(processed) == newest
    assert processed.timestamps == pytest.approx([n + 0.25 for n in range(12)])


def test_a_rate_that_only_the_times_tell_is_a_number_that_can_be_sent() -> None:
    rate = timeline(np.arange(12) / 10, last_s=0.0, header_rate=25.0).rate
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rate)) == pytest.approx(10.0)


def test_a_hole_in_a_film_keeps_the_times_behind_it() -> None:
    times = [n / 10 for n in range(100) if not 30 <= n < 60]
    processed = process(film(times, rate=10), num_frames=20)
    assert processed.timestamps == pytest.approx([n + 0.25 for n in range(10)])
    shown = [times[number] for number in numbers(processed)]
    assert shown == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, *[2.9] * 6, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5])


def test_a_film_that_starts_late_is_counted_from_its_first_frame() -> None:
    processed = process(film([7 + n / 10 for n in range(20)], rate=10, container="mpegts"), num_frames=4)
    assert processed.timestamps == pytest.approx([0.25, 1.25])
    assert numbers(processed) == [0, 5, 10, 15]


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_the_shortest_films_are_used(count: int, steps: int) -> None:
    processed = process(film(count))
    assert processed.grid[0] == steps
    assert numbers(processed)[0] == 0
    assert len(processed.timestamps) == steps


def test_qwen3_takes_the_first_frame_and_the_last() -> None:
    processed = process(film(50), QWEN3, num_frames=5)
    assert numbers(processed) == [0, 12, 24, 37, 49, 49], "the last one fills the last step"
    assert processed.timestamps == pytest.approx([0.24, 1.22, 1.96])


def _with_cover(cover_first: bool) -> bytes:
    """A film and the picture on its box, which is a video stream to the container."""
    plain = film(25)
    buffer = io.BytesIO()
    with av.open(io.BytesIO(plain)) as source, av.open(buffer, "w", format="mp4") as output:
        streams = {}
        for name in ("cover", "film") if cover_first else ("film", "cover"):
            if name == "film":
                streams[name] = output.add_stream_from_template(source.streams.video[0])
            else:
                streams[name] = output.add_stream("mjpeg", rate=1)
                streams[name].width, streams[name].height, streams[name].pix_fmt = 640, 480, "yuvj420p"
                streams[name].disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((480, 640, 3), np.uint8), format="rgb24")
        for packet in (*streams["cover"].encode(picture), *streams["cover"].encode()):
            output.mux(packet)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = streams["film"]
                output.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("cover_first", [False, True])
def test_of_several_video_streams_the_one_that_plays_is_taken(cover_first: bool) -> None:
    assert numbers(process(_with_cover(cover_first), num_frames=4)) == [0, 6, 12, 18]


def test_sound_beside_a_film_changes_nothing() -> None:
    assert numbers(process(film(50, audio=True), num_frames=4)) == [0, 12, 25, 37]


def test_a_film_that_breaks_off_is_used_with_true_times() -> None:
    whole = film(200, container="matroska")
    processed = process(whole[: len(whole) * 2 // 3], fps=5.0)
    shown = numbers(processed)
    assert 10 < len(shown) < 40
    assert shown[:3] == [0, 5, 10]
    steps = zip(shown[::2], shown[1::2], strict=True)
    assert processed.timestamps == pytest.approx([(a + b) / 50 for a, b in steps])


def test_a_frame_that_is_broken_is_left_out_and_the_others_keep_their_times() -> None:
    data = bytearray(film(60, container="mp4", codec="mjpeg"))
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = next(p for n, p in enumerate(container.demux(video=0)) if n == 15)
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    processed = process(bytes(data), num_frames=4)
    assert numbers(processed) == [0, 30, 45, 45]
    assert processed.timestamps == pytest.approx([0.6, 1.8])


def test_a_film_that_changes_its_size_keeps_the_first() -> None:
    data = film(25, container="mpegts", codec="mpeg2video") + film(
        25, container="mpegts", codec="mpeg2video", size=(28 * 14 // 2, 112)
    )
    with suppress(MediaError):
        processed = process(data, num_frames=6)
        assert processed.features.shape[0] == np.prod(processed.grid)


def test_a_film_of_4k_is_taken() -> None:
    data = film(8, size=(3840, 2160), options={"preset": "ultrafast"})
    assert numbers(process(data, num_frames=4)) == [0, 2, 4, 6]


def test_a_film_longer_than_the_limit_is_refused_by_its_own_times() -> None:
    data = film([0, 0.1, 0.2], rate=10, last_s=100.0, options={"bf": "0"})
    with pytest.raises(MediaTooLargeError, match=r"lasts 100\.2 s; the limit is 60 s"):
        process(data, max_video_s=60.0)


HOUR = """
import resource, sys, time
from tests.media.film_maker import film, numbers, process
data = open(sys.argv[1], "rb").read()
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
processed = process(data, num_frames=64)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
numbers(processed)[-1])
"""


@pytest.mark.slow
def test_an_hour_is_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "hour.mp4"
    path.write_bytes(film(90_000, size=(28 * 14, 224), gop=250, options={"preset": "ultrafast"}))
    done = subprocess.run(
        [sys.executable, "-c", HOUR, str(path)], capture_output=True, text=True, check=True, timeout=250
    )
    seconds, kib, last = done.stdout.split()
    assert int(last) == (63 * 90_000 // 64) % (1 << 14)
    assert int(kib) < 256 << 10, "the film is never held"
    assert float(seconds) < 60
