"""Encoded videos to features: the container is read through once, then only what leads to the frames that are wanted
is decoded, and each of them is resized as soon as it is there. Runs in decoding processes; the only module that needs
PyAV."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.images import explained
from dashinfer_vlm.media.timeline import Timeline, timeline
from dashinfer_vlm.media.videos import check_work
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import Pixels, Processed, process_timed_frames
from dashinfer_vlm.processors.videos import seconds_per_grid

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "gif")
"""FFmpeg's names. Playlists (hls, dash, concat) stay out: they make the decoder open other files and hosts."""

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "theora",
          "gif", "h263", "flv", "prores", "libvpx", "libvpx-vp9")  # fmt: skip

_WHOLE = ("gif",)
"""Codecs whose key frames may need what came before them: decoded from the start."""
_DELAY = 64
"""Packets behind its own by which a frame has come out of any decoder."""
_SKIPS = ("h264", "hevc", "mpeg2video", "mpeg4")
"""Codecs that leave out frames that no other frame needs when they are told to."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """What the packets of a film tell before anything is decoded."""

    size: tuple[int, int]
    """Width and height as stored."""
    timeline: Timeline
    stamps: list[int]
    """Time stamp of each frame, in the order of showing; its number where the container has no time stamps."""
    stamped: bool
    places: list[int]
    """Number of the packet that holds each frame, in the order of showing."""
    keys: list[tuple[int, int]]
    """(number, time stamp) of packets at which decoding can begin."""

    def start(self, frame: int) -> int:
        """Number of the packet to decode from in order to see `frame`."""
        nearest = bisect_right(self.keys, (self.places[frame], math.inf)) - 1
        while nearest >= 0 and self.keys[nearest][1] > self.stamps[frame]:
            nearest -= 1  # it is shown before the key frame that it follows in the file
        return self.keys[nearest][0] if self.stamped and nearest >= 0 else 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    moment: int
    stamp: int
    place: int
    """Number of the packet that holds it."""
    start: int
    """Number of the packet to decode from."""


def process_film(data: bytes, terms: Terms) -> Processed:
    """Sample, resize and cut a video. A partly broken one gives the frames that decode, with their own times.

    Raises MediaError when nothing decodes, MediaTooLargeError for what the terms do not allow.
    """
    with explained("video"):
        return _process(data, terms)


def _process(data: bytes, terms: Terms) -> Processed:
    config = terms.config
    contents = _read_through(data, terms.max_pixels)
    line = contents.timeline
    if line.seconds > terms.max_video_s:
        raise MediaTooLargeError(f"the video lasts {line.seconds:.1f} s; the limit is {terms.max_video_s:g} s")
    chosen = config.video.choose(line.total, line.rate, terms.sampling, config.temporal_patch_size)
    if all(contents.size):  # whichever way up: the number of patches is the same
        check_work(*contents.size, len(chosen), terms)
    step_s = seconds_per_grid(len(chosen), line.total, line.rate, config.temporal_patch_size)
    timed = ((moment / line.rate, pixels) for moment, pixels in _shown(data, chosen, contents, terms.max_pixels))
    return process_timed_frames(timed, config, num_frames=len(chosen), seconds_per_grid=step_s)


def _shown(data: bytes, chosen: list[int], contents: _Contents, max_pixels: int) -> Iterator[tuple[int, Pixels]]:
    """The chosen moments with their pixels. What key frames that were none have cost is decoded from the start."""
    wanted = list(_wanted(chosen, contents))
    missed: list[_Wanted] = []
    yield from _decode(data, wanted, contents.stamped, max_pixels, missed)
    if missed and any(want.start for want in wanted):
        again = [replace(want, start=0) for want in missed]
        yield from _decode(data, again, contents.stamped, max_pixels, [])


def _wanted(chosen: list[int], contents: _Contents) -> Iterator[_Wanted]:
    for moment in chosen:
        frame = contents.timeline.frame(moment)
        yield _Wanted(moment, contents.stamps[frame], contents.places[frame], contents.start(frame))


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream that a player shows."""
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    try:
        container = av.open(io.BytesIO(data), options=options)
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"this is not a video of a known container ({', '.join(CONTAINERS)})") from error
    with container:
        stream = _playing(container)
        if stream.codec_context is None or stream.codec_context.name not in CODECS:
            raise MediaError("the video's codec is not one that this server decodes")
        stream.codec_context.thread_count = 1  # frame threads multiply memory, and the cores belong to the model
        yield container, stream


def _playing(container: Any) -> Any:
    """The default video stream, else the largest; covers and thumbnails are none."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if not streams:
        raise MediaError("the file has no video stream")
    return max(streams, key=lambda stream: (bool(stream.disposition & Disposition.default), *_size(stream)))


def _size(stream: Any) -> tuple[int, int]:
    decoder = stream.codec_context
    return (decoder.width, decoder.height) if decoder is not None else (0, 0)


def _read_through(data: bytes, max_pixels: int) -> _Contents:
    """All packets, none of them decoded. Raises MediaError when there is none."""
    with _opened(data) as (container, stream):
        size = _size(stream)
        _check_pixels(*size, max_pixels)
        name, unit = stream.codec_context.name, float(stream.time_base or 0)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        found = [(p.pts, p.duration or 0, p.is_keyframe) for p in _packets(container, stream)]
    if not found:
        raise MediaError("the video has no frame that can be used")
    stamped = unit > 0 and all(pts is not None for pts, _, _ in found)
    if not stamped:
        times = np.arange(len(found)) / (rate or 1.0)
        numbers = list(range(len(found)))
        return _Contents(size, timeline(times, 0.0, rate), numbers, False, numbers, [])
    places = sorted(range(len(found)), key=lambda number: found[number][0])
    stamps = [found[number][0] for number in places]
    times = (np.asarray(stamps, np.float64) - stamps[0]) * unit
    keys = [(number, pts) for number, (pts, _, key) in enumerate(found) if key and name not in _WHOLE]
    line = timeline(times, found[places[-1]][1] * unit, rate)
    return _Contents(size, line, stamps, True, places, keys)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Those that hold a frame to show; of a file that is cut, what came before."""
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                yield packet
    except av.error.FFmpegError:
        return


def _decode(
    data: bytes, wanted: Sequence[_Wanted], stamped: bool, max_pixels: int, missed: list[_Wanted]
) -> Iterator[tuple[int, Pixels]]:
    """The wanted frames as they come, with their moments; those that do not come are added to `missed`.

    Between the frames, decoding is taken up again at the key frame before the next one. Each is held on its own.
    """
    shown = _Shown(wanted, stamped, max_pixels)
    with _opened(data) as (container, stream):
        decoder, running = stream.codec_context, False
        skips = stamped and decoder.name in _SKIPS
        for number, packet in enumerate(_packets(container, stream)):
            missed += shown.overdue(number)
            if not shown.left:
                return
            if number < shown.left[0].start:
                if running:
                    decoder.flush_buffers()
                running = False
                continue
            running = True
            if skips:
                decoder.skip_frame = "DEFAULT" if packet.pts in shown.stamps else "NONREF"
            yield from shown.take(_decoded(decoder, packet))
        yield from shown.take(_decoded(decoder, None))
    missed += shown.left


class _Shown:
    """Picks the wanted frames out of what a decoder delivers."""

    def __init__(self, wanted: Sequence[_Wanted], stamped: bool, max_pixels: int) -> None:
        self.left = deque(wanted)
        """Those that have not come yet, in the order of showing."""
        self.stamps = {want.stamp for want in wanted}
        self._stamped = stamped
        self._max_pixels = max_pixels
        self._number = 0
        self._size: tuple[int, int] | None = None

    def overdue(self, number: int) -> list[_Wanted]:
        """Give up those that should have come long before packet `number`."""
        late: list[_Wanted] = []
        while self.left and self.left[0].place + _DELAY < number:
            late.append(self.left.popleft())
        return late

    def take(self, frames: list[Any]) -> Iterator[tuple[int, Pixels]]:
        for frame in frames:
            stamp = frame.pts if self._stamped else self._number
            self._number += 1
            found = [want for want in self.left if want.stamp == stamp] if stamp in self.stamps else []
            if found:
                self.left = deque(want for want in self.left if want.stamp != stamp)
                pixels = self._pixels(frame)
                yield from ((want.moment, pixels) for want in found)

    def _pixels(self, frame: Any) -> Pixels:
        """uint8 [H, W, 3], upright (a phone's rotation applied), of the first frame's size."""
        _check_pixels(frame.width, frame.height, self._max_pixels)
        self._size = self._size or (frame.width, frame.height)
        pixels = frame.to_ndarray(format="rgb24", width=self._size[0], height=self._size[1])
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _decoded(decoder: Any, packet: Any) -> list[Any]:
    try:
        return list(decoder.decode(packet))
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return []


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if math.prod((width, height)) > max_pixels:
        raise MediaTooLargeError(
            f"the video's frames have {width}x{height} pixels; the limit is {max_pixels / 1e6:g} million"
        )
