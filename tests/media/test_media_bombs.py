"""Small files that would take long to decode are refused before they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tests.media.site import LoaderMaker

from dashinfer_vlm.errors import MediaTooLargeError
from dashinfer_vlm.media.images import decode, open_image
from dashinfer_vlm.media.jpeg import MAX_SCANS, most_scans, num_scans
from dashinfer_vlm.media.types import MediaRef


def jpeg(*, progressive: bool = True, width: int = 640) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (480, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", progressive=progressive, exif=_exif_with_a_thumbnail())
    return buffer.getvalue()


def _exif_with_a_thumbnail() -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + b"\xff\xda" * 500


def with_scans(number: int) -> bytes:
    """The last scan of a progressive picture, again and again: it refines nothing but is decoded each time."""
    data = jpeg()
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + scan * (number - num_scans(data)) + data[-2:]


def test_scans_are_counted_by_their_markers_alone() -> None:
    assert num_scans(jpeg(progressive=False)) == 1
    assert 1 < num_scans(jpeg()) <= 15
    assert num_scans(with_scans(60)) == 60
    assert num_scans(with_scans(5000)) == MAX_SCANS + 1
    assert num_scans(b"\xff\xd8\xff") == num_scans(b"no jpeg") == 0


@pytest.mark.parametrize("cut", [3, 5, 100, 5000])
def test_a_cut_file_is_counted_as_far_as_it_goes(cut: int) -> None:
    assert 0 <= num_scans(jpeg()[:cut]) <= 15


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once_and_a_usual_one_is_not() -> None:
    assert decode(open_image(jpeg(), 10**6)).shape == (480, 640, 3)
    with pytest.raises(MediaTooLargeError, match="more than 100 scans; save it with fewer, or as a baseline JPEG"):
        open_image(with_scans(5000), 10**7)
    with pytest.raises(MediaTooLargeError, match="more than 20 scans"):
        open_image(with_scans(21), 640 * 480 * 20 // 16)
    assert most_scans(640 * 480, 640 * 480) == 16, "the largest image may be progressive"


def webp_of_few_bytes(width: int, height: int) -> bytes:
    """A lossless WebP of one colour (VP8L, RFC 9649): its sides take 14 bits each, its pixels take none."""
    bits = [(width - 1, 14), (height - 1, 14), (0, 4)]  # no alpha, version 0
    bits += [(0, 3)]  # no transforms, no cache of colours, one group of codes
    bits += [(0b101, 3), (128, 8)] * 4 + [(0b001, 3), (0, 1)]  # each code has the only symbol 128, that of distances 0
    value = position = 0
    for number, size in bits:
        value, position = value | number << position, position + size
    body = b"\x2f" + value.to_bytes(position // 8 + 1, "little")
    body += bytes(len(body) % 2)
    return b"RIFF" + (12 + len(body)).to_bytes(4, "little") + b"WEBPVP8L" + len(body).to_bytes(4, "little") + body


async def test_eight_small_files_of_169_million_pixels_cost_nothing(make_loader: LoaderMaker) -> None:
    data = webp_of_few_bytes(13_000, 13_000)
    assert len(data) < 100
    assert decode(open_image(webp_of_few_bytes(300, 200), 10**6)).shape == (200, 300, 3)
    loader = make_loader()
    for _ in range(8):
        with pytest.raises(MediaTooLargeError, match="13000x13000 pixels; the limit is 64 million"):
            await loader.load(MediaRef(kind="image", source=data))


async def test_a_tiny_file_of_many_pixels_is_refused_by_default(make_loader: LoaderMaker) -> None:
    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    with pytest.raises(MediaTooLargeError, match=r"13000x13000 pixels; the limit is 64 million; .* --max-image-mpx"):
        await make_loader().load(MediaRef(kind="image", source=buffer.getvalue()))
