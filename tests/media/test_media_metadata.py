"""Large, odd and broken descriptions beside good pixels: the pixels are read."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from dashinfer_vlm.media.images import decode, open_image, orientation
from dashinfer_vlm.media.png import without_descriptions
from dashinfer_vlm.processors.qwen import Pixels

pytestmark = pytest.mark.filterwarnings("ignore")  # as in the decoding process, which looks at what can be decoded

PIXELS: Pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
BIG = 3 << 20


def encoded(format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Pixels:
    return decode(open_image(data, 10_000))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks: bytes, after_pixels: bool = False) -> bytes:
    data = encoded("PNG")
    position = data.index(b"IEND") - 4 if after_pixels else 33
    return data[:position] + b"".join(chunks) + data[position:]


def packed(num_bytes: int = BIG) -> bytes:
    return zlib.compress(bytes(num_bytes))


PNGS: dict[str, tuple[bytes, ...]] = {
    "a colour profile": (chunk(b"iCCP", b"large\0\0" + packed()),),
    "a compressed text": (chunk(b"zTXt", b"Comment\0\0" + packed()),),
    "an international text": (chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed()),),
    "plain XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(BIG)),),
    "compressed XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed()),),
    "many texts": tuple(chunk(b"zTXt", b"%d\0\0" % n + packed(1 << 20)) for n in range(100)),
    "a plain text": (chunk(b"tEXt", b"Comment\0" + bytes(BIG)),),
    "an unknown compression": (chunk(b"zTXt", b"Comment\0\7" + packed()), chunk(b"iCCP", b"p\0\7" + packed())),
    "no content": (chunk(b"iCCP", b""), chunk(b"zTXt", b""), chunk(b"iTXt", b""), chunk(b"tEXt", b"")),
    "a wrong checksum": (chunk(b"iCCP", b"p\0\0" + packed())[:-1] + b"!",),
    "two profiles": (chunk(b"iCCP", b"p\0\0" + packed()),) * 2,
}


@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize("chunks", PNGS.values(), ids=PNGS)
def test_a_png_is_read_whatever_describes_it(chunks: tuple[bytes, ...], after_pixels: bool) -> None:
    assert np.array_equal(decoded(png_with(*chunks, after_pixels=after_pixels)), PIXELS)


def test_what_a_png_needs_for_its_pixels_stays() -> None:
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + turned))
    assert orientation(open_image(data, 10_000)) == 6
    transparent = encoded("PNG", transparency=(1, 2, 3))
    assert without_descriptions(transparent) == transparent
    assert without_descriptions(b"GIF89a") == b"GIF89a"


@pytest.mark.parametrize("cut", [9, 20, 34, 60])
def test_a_png_that_breaks_off_stays_as_it_is(cut: int) -> None:
    data = png_with()[:cut]
    assert without_descriptions(data) == data


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(*segments: bytes) -> bytes:
    data = encoded("JPEG", quality=95)
    return data[:2] + b"".join(segments) + data[2:]


def profile_parts(num_parts: int) -> tuple[bytes, ...]:
    head = b"ICC_PROFILE\0"
    return tuple(segment(0xE2, head + bytes((n + 1, num_parts)) + bytes(60_000)) for n in range(num_parts))


JPEGS: dict[str, Callable[[], bytes]] = {
    "a colour profile in 100 parts": lambda: jpeg_with(*profile_parts(100)),
    "a part of a profile": lambda: jpeg_with(profile_parts(3)[1]),
    "every application's segment, full": lambda: jpeg_with(*(segment(0xE0 + n, bytes(65_000)) for n in range(14))),
    "every application's segment, empty": lambda: jpeg_with(*(segment(0xE0 + n, b"") for n in range(16))),
    "comments": lambda: jpeg_with(*(segment(0xFE, bytes(65_000)),) * 50),
    "broken EXIF": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + b"II*\0" + b"\xff" * 60_000)),
    "EXIF that refers to itself": lambda: jpeg_with(
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0")
    ),
    "XMP that is no XML": lambda: jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 60_000)),
    "a broken list of pictures": lambda: jpeg_with(segment(0xE2, b"MPF\0II*\0" + b"\xff" * 100)),
    "broken Photoshop data": lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + b"\xff" * 100)),
}


@pytest.mark.parametrize("make", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_is_read_whatever_describes_it(make: Callable[[], bytes]) -> None:
    assert np.array_equal(decoded(make()), decoded(encoded("JPEG", quality=95)))


@pytest.mark.parametrize("format", ["WEBP", "TIFF", "AVIF"])
def test_large_descriptions_in_other_formats_are_passed_over(format: str) -> None:
    lossless = {"lossless": True} if format == "WEBP" else {}
    plain = decoded(encoded(format, **lossless))
    assert np.array_equal(decoded(encoded(format, icc_profile=bytes(BIG), **lossless)), plain)
    exif = Image.Exif()
    exif[0x010E] = "x" * BIG  # the description
    assert np.array_equal(decoded(encoded(format, exif=exif.tobytes(), **lossless)), plain)
    if format == "WEBP":
        assert np.array_equal(decoded(encoded(format, xmp=b"<" * BIG, exif=b"no exif", **lossless)), plain)
