"""Encoded videos to patches: the container is probed, frames are sampled, each is resized as soon as it is decoded.
Runs in decoding processes; the only module that needs PyAV."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.images import explained
from dashinfer_vlm.media.videos import check_work
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import Pixels, Processed, process_timed_frames
from dashinfer_vlm.processors.videos import seconds_per_grid

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "gif")
"""FFmpeg's names. Playlists (hls, dash, concat) stay out: they make the decoder open other files and hosts."""

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "theora",
          "gif", "h263", "flv", "prores", "libvpx", "libvpx-vp9")  # fmt: skip

_FASTEST, _SLOWEST = 1000.0, 0.01
"""Believable frames per second; beyond, the header is wrong."""


def process_film(data: bytes, terms: Terms) -> Processed:
    """Sample, resize and cut a video. A partly broken one gives the frames that decode.

    Raises MediaError when nothing decodes, MediaTooLargeError for what the terms do not allow.
    """
    with explained("video"):
        return _process(data, terms)


def _process(data: bytes, terms: Terms) -> Processed:
    config = terms.config
    total, rate, (width, height) = _probe(data, terms.max_pixels)
    if total / rate > terms.max_video_s:
        raise MediaTooLargeError(f"the video lasts {total / rate:.1f} s; the limit is {terms.max_video_s:g} s")
    chosen = config.video.choose(total, rate, terms.sampling, config.temporal_patch_size)
    if chosen and width and height:  # whichever way up: the number of patches is the same
        check_work(width, height, len(chosen), terms)
    step_s = seconds_per_grid(max(len(chosen), 1), max(total, 1), rate, config.temporal_patch_size)
    frames = ((index / rate, frame) for index, frame in _frames(data, frozenset(chosen), terms.max_pixels))
    return process_timed_frames(frames, config, num_frames=max(len(chosen), 1), seconds_per_grid=step_s)


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    try:
        container = av.open(io.BytesIO(data), options=options)
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"this is not a video of a known container ({', '.join(CONTAINERS)})") from error
    with container:
        if not container.streams.video:
            raise MediaError("the file has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None or stream.codec_context.name not in CODECS:
            raise MediaError("the video's codec is not one that this server decodes")
        stream.codec_context.thread_count = 1  # frame threads multiply memory, and the cores belong to the model
        yield container, stream


def _probe(data: bytes, max_pixels: int) -> tuple[int, float, tuple[int, int]]:
    """Number of frames, counted rather than believed, frames per second, and their width and height as stored."""
    with _opened(data) as (container, stream):
        size = stream.codec_context.width, stream.codec_context.height
        _check_pixels(*size, max_pixels)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        total = sum(1 for packet in _packets(container, stream) if packet.size)
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if not _SLOWEST <= rate <= _FASTEST and seconds > 0:
        rate = total / seconds
    if total and not _SLOWEST <= rate <= _FASTEST:
        raise MediaError("the video does not say how many frames a second has")
    return total, rate or 1.0, size


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return  # a cut file ends here; what came before counts


def _frames(data: bytes, wanted: frozenset[int], max_pixels: int) -> Iterator[tuple[int, Pixels]]:
    """The wanted frames in order with their index among those that decode; damaged packets are skipped."""
    left = set(wanted)
    index = 0
    with _opened(data) as (container, stream):
        for packet in _packets(container, stream):
            for frame in _decoded(packet):
                _check_pixels(frame.width, frame.height, max_pixels)
                if index in left:
                    left.discard(index)
                    yield index, _upright(frame)
                index += 1
            if not left:
                return


def _decoded(packet: Any) -> list[Any]:
    try:
        return list(packet.decode())
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return []


def _upright(frame: Any) -> Pixels:
    """uint8 [H, W, 3] with the container's rotation (a phone held upright) applied."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if math.prod((width, height)) > max_pixels:
        raise MediaTooLargeError(
            f"the video's frames have {width}x{height} pixels; the limit is {max_pixels / 1e6:g} million"
        )
