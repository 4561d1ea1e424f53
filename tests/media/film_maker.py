"""Films made by PyAV: each frame shows its own number, so that it can be told which ones were taken."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

from dashinfer_vlm.media.films import process_film
from dashinfer_vlm.media.wire import Terms
from dashinfer_vlm.processors.qwen import Pixels, Processed, ProcessorConfig
from dashinfer_vlm.processors.videos import Qwen2Video, Sampling

BITS = 14
CONFIG = ProcessorConfig(video=Qwen2Video(min_pixels=28 * 28, max_pixels=28 * 28 * 64))


def picture_of(number: int, width: int, height: int) -> Pixels:
    """`number` as a row of black and white bars, its lowest bit first."""
    bars = np.array([235 if number >> bit & 1 else 16 for bit in range(BITS)], np.uint8)
    return np.repeat(np.broadcast_to(bars.repeat(width // BITS), (height, width // BITS * BITS))[..., None], 3, axis=2)


def film(
    times: Sequence[float] | int,
    *,
    rate: float = 25.0,
    container: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (28 * BITS, 56),
    last_s: float | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
    audio: bool = False,
) -> bytes:
    """Frame n is shown at `times[n]` seconds (evenly at `rate` for a number of frames), the last one for `last_s`."""
    moments = [n / rate for n in range(times)] if isinstance(times, int) else list(times)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        steady = Fraction(rate).limit_denominator(1001)
        stream = output.add_stream(codec, rate=steady, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
        stream.gop_size = gop
        unit = 1 / steady if isinstance(times, int) else Fraction(1, 1000)
        stream.codec_context.time_base = unit
        sound = output.add_stream("aac", rate=16000) if audio else None
        for number, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(picture_of(number, *size), format="rgb24")
            frame.pts, frame.time_base = round(moment / unit), unit
            _mux(output, stream.encode(frame), moments, last_s)
        _mux(output, stream.encode(), moments, last_s)
        if sound is not None:
            _hum(output, sound)
    return buffer.getvalue()


def _mux(output: Any, packets: Sequence[Any], moments: Sequence[float], last_s: float | None) -> None:
    for packet in packets:
        if last_s is not None and packet.pts * packet.time_base >= moments[-1] - 1e-3:
            packet.duration = round(last_s / packet.time_base)
        output.mux(packet)


def _hum(output: Any, stream: Any) -> None:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    for packet in (*stream.encode(frame), *stream.encode()):
        output.mux(packet)


def process(data: bytes, config: ProcessorConfig = CONFIG, *, max_video_s: float = 4000.0, **asked: Any) -> Processed:
    terms = Terms(config=config, sampling=Sampling(**asked), max_pixels=10_000_000, max_video_s=max_video_s)
    return process_film(data, terms)


def numbers(processed: Processed, config: ProcessorConfig = CONFIG) -> list[int]:
    """The numbers that the frames show."""
    steps, rows, columns = processed.grid
    merge, patch, pair = config.merge_size, config.patch_size, config.temporal_patch_size
    cut = processed.features.reshape(steps, rows // merge, columns // merge, merge, merge, 3, pair, patch, patch)
    frames = cut.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(steps * pair, rows * patch, columns * patch, 3)
    bars = frames.mean(axis=(1, 3)).reshape(len(frames), BITS, -1)
    middle = bars.shape[2] // 4
    lit = bars[:, :, middle:-middle].mean(axis=2) > 128
    return [int(sum(1 << bit for bit in range(BITS) if bits[bit])) for bits in lit]
