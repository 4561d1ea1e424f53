"""Every mode and format against the reference processor, and everything that is not quite a picture."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.images import FORMATS, decode, open_image, orientation, upright_size
from dashinfer_vlm.processors.qwen import Pixels, ProcessorConfig, image_grid, process_image

MAX_PIXELS = 10_000_000
Source = Callable[[], bytes]


def colours(width: int = 70, height: int = 50) -> Image.Image:
    """A picture with every channel and its alpha in motion."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    channels = (across, down, 255 - across, (across + down) / 2)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8), "RGBA")


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Pixels:
    return decode(open_image(data, MAX_PIXELS))


def palette_with_transparency() -> bytes:
    image = colours().convert("RGB").quantize(16)
    return encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))


def animation(format: str) -> bytes:
    frames = [Image.new("RGBA", (60, 40), colour) for colour in ("#ff000080", "green", "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)


TABLE: dict[str, Source] = {
    "png RGB": lambda: encoded(colours().convert("RGB"), "PNG"),
    "png RGBA": lambda: encoded(colours(), "PNG"),
    "png L": lambda: encoded(colours().convert("L"), "PNG"),
    "png LA": lambda: encoded(colours().convert("LA"), "PNG"),
    "png 1": lambda: encoded(colours().convert("1"), "PNG"),
    "png P": lambda: encoded(colours().convert("RGB").quantize(64), "PNG"),
    "png P transparent": palette_with_transparency,
    "png RGB transparent": lambda: encoded(Image.new("RGB", (40, 40), "red"), "PNG", transparency=(255, 0, 0)),
    "png L transparent": lambda: encoded(Image.new("L", (40, 40), 7), "PNG", transparency=7),
    "png animated": lambda: animation("PNG"),
    "jpeg": lambda: encoded(colours().convert("RGB"), "JPEG"),
    "jpeg L": lambda: encoded(colours().convert("L"), "JPEG"),
    "jpeg CMYK": lambda: encoded(colours().convert("RGB").convert("CMYK"), "JPEG"),
    "jpeg YCbCr progressive": lambda: encoded(colours().convert("YCbCr"), "JPEG", progressive=True),
    "mpo": lambda: encoded(colours().convert("RGB"), "MPO", save_all=True, append_images=[colours().convert("L")]),
    "webp": lambda: encoded(colours(), "WEBP", lossless=True),
    "webp animated": lambda: animation("WEBP"),
    "gif": lambda: encoded(colours().convert("RGB").quantize(32), "GIF", transparency=3),
    "gif animated": lambda: animation("GIF"),
    "bmp": lambda: encoded(colours().convert("RGB"), "BMP"),
    "tiff RGB": lambda: encoded(colours().convert("RGB"), "TIFF", compression="tiff_lzw"),
    "tiff CMYK": lambda: encoded(colours().convert("RGB").convert("CMYK"), "TIFF"),
    "tiff I": lambda: encoded(colours().convert("L").convert("I"), "TIFF"),
    "tiff F": lambda: encoded(colours().convert("L").convert("F"), "TIFF"),
    "avif": lambda: encoded(colours(), "AVIF"),
    "1x1": lambda: encoded(Image.new("RGB", (1, 1), "teal"), "PNG"),
    "200x1": lambda: encoded(Image.new("RGB", (200, 1), "teal"), "PNG"),
}


@pytest.mark.parametrize("name", TABLE)
def test_patches_of_every_mode_equal_those_of_the_reference(name: str) -> None:
    if name == "avif" and "AVIF" not in FORMATS:
        pytest.skip("this Pillow was built without AVIF")
    data = TABLE[name]()
    config = ProcessorConfig()
    ours = process_image(decoded(data), config)
    theirs = Qwen2VLImageProcessorPil()(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), return_tensors="np")
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist()
    mean, std = np.asarray(config.image_mean), np.asarray(config.image_std)
    channels = theirs["pixel_values"].reshape(len(ours.features), 3, -1) * std[:, None] + mean[:, None]
    values = channels.reshape(ours.features.shape) * 255
    assert np.abs(values - ours.features).max() <= 1.0


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_picture_is_seen_upright_and_its_size_known_from_the_header(turn: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(colours(90, 40).convert("RGB"), format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decoded(data), expected)
    header = open_image(data, MAX_PIXELS)
    assert upright_size(header) == expected.shape[1::-1]
    assert image_grid(*upright_size(header), ProcessorConfig()) == process_image(expected, ProcessorConfig()).grid


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00"])
def test_a_damaged_exif_block_does_not_cost_the_picture(block: bytes) -> None:
    data = encoded(Image.new("RGB", (40, 30), "red"), "JPEG", exif=block)
    assert orientation(open_image(data, MAX_PIXELS)) == 1
    assert decoded(data).shape == (30, 40, 3)


def test_an_orientation_that_does_not_exist_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    data = encoded(Image.new("RGB", (40, 30), "red"), "JPEG", exif=exif)
    assert orientation(open_image(data, MAX_PIXELS)) == 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_shades(format: str) -> None:
    shades = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    seen = decoded(encoded(Image.fromarray(shades), format))
    assert np.array_equal(seen, np.repeat((shades >> 8).astype(np.uint8)[..., None], 3, axis=-1))


def test_transparent_is_white() -> None:
    assert decoded(encoded(Image.new("RGBA", (30, 30), (0, 0, 0, 0)), "PNG")).min() == 255


def test_of_an_animation_the_first_frame_is_seen() -> None:
    for format in ("GIF", "WEBP", "PNG"):
        red, green, blue = decoded(animation(format))[20, 30].tolist()
        assert red > 200, format
        assert max(green, blue) < 150, format


def png_header(width: int, height: int, colour_type: int = 2) -> bytes:
    """A PNG that claims a size and has next to no pixels: a decompression bomb in its cheapest form."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_a_header_of_40000x40000_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(MediaTooLargeError, match="40000x40000 pixels; the limit is 10 million"):
        open_image(png_header(40_000, 40_000), MAX_PIXELS)


def test_the_limit_of_pixels_is_exact() -> None:
    data = encoded(Image.new("L", (100, 100)), "PNG")
    assert open_image(data, 10_000).size == (100, 100)
    with pytest.raises(MediaTooLargeError):
        open_image(data, 9_999)


FOREIGN = {
    "empty": b"",
    "text": b"this is not a picture",
    "html": b"<!doctype html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
    "zip": b"PK\x03\x04" + bytes(100),
    "pdf": b"%PDF-1.7\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "ppm": b"P6 2 2 255\n" + bytes(12),
    "icon": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "targa": encoded(Image.new("RGB", (16, 16)), "TGA"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_a_known_format_is_said_to_be_none(name: str) -> None:
    with pytest.raises(MediaError, match=r"not an image of a known format \(JPEG, PNG") as caught:
        decoded(FOREIGN[name])
    assert "0x" not in str(caught.value), "no addresses of memory"


@pytest.mark.parametrize(
    "name", ["png RGB", "jpeg", "webp", "gif", "bmp", "tiff RGB", "avif", "jpeg YCbCr progressive"]
)
def test_a_picture_cut_anywhere_is_a_media_error(name: str) -> None:
    data = TABLE[name]()
    for end in sorted({1, 4, 12, *range(20, len(data) * 3 // 4, max(1, len(data) // 17))}):
        with pytest.raises(MediaError):
            decoded(data[:end])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", TABLE)
def test_damaged_bytes_give_a_picture_or_a_media_error(name: str) -> None:
    data = TABLE[name]()
    rng = np.random.default_rng(0)
    for _ in range(25):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 8):
            damaged[position] = rng.integers(0, 256)
        with suppress(MediaError):  # any other exception fails the test
            assert decoded(bytes(damaged)).shape[2] == 3
