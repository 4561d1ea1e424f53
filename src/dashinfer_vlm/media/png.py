"""PNG files without what describes their pixels: colour profiles and texts, which a decoder unpacks for nobody."""

from __future__ import annotations

from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_DESCRIPTIONS = {b"iCCP", b"zTXt", b"tEXt"}
_MAX_XMP_BYTES = 1 << 20


def without_descriptions(data: bytes) -> bytes:
    """The same image without its colour profile and texts; what is no PNG comes back as it is.

    Pillow unpacks these chunks while it opens a file and refuses a file where one unpacks to more than 1 MiB, however
    good its pixels. Plain XMP stays, since it may say which way up the image is.
    """
    if not data.startswith(SIGNATURE):
        return data
    return b"".join((SIGNATURE, *_kept(memoryview(data))))


def _kept(data: memoryview) -> Iterator[memoryview]:
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")  # length, name, content, checksum
        if not _describes(bytes(data[position + 4 : position + 8]), data[position + 8 : end - 4]):
            yield data[position:end]
        position = end
    yield data[position:]


def _describes(name: bytes, content: memoryview) -> bool:
    if name != b"iTXt":
        return name in _DESCRIPTIONS
    plain_xmp = bytes(content[:22]).startswith(b"XML:com.adobe.xmp\x00\x00")
    return not plain_xmp or len(content) > _MAX_XMP_BYTES
