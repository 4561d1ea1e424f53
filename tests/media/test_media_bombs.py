"""Small files that would take long to decode are refused before they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tests.media.site import LoaderMaker

from dashinfer_vlm.errors import MediaTooLargeError
from dashinfer_vlm.media.images import decode, open_image
from dashinfer_vlm.media.jpeg import MAX_SCANS, num_scans
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
        open_image(with_scans(5000), 10**6)


async def test_a_tiny_file_of_many_pixels_is_refused_by_default(make_loader: LoaderMaker) -> None:
    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    with pytest.raises(MediaTooLargeError, match=r"13000x13000 pixels; the limit is 64 million; .* --max-image-mpx"):
        await make_loader().load(MediaRef(kind="image", source=buffer.getvalue()))
