"""One file of packed weights: safetensors, so that other tools can look at it, with one more description in its metadata.

A file is either whole or not there, since it gets its name when it is complete; what happens to it later is found by
its size and by a checksum per weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedShape, PackedWeight

__all__ = ["Entry", "UnusableError", "write_entry"]

_METADATA = "__metadata__"
_OURS = "dashinfer_vlm"
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 64 << 20
_LENGTH_BYTES = 8


class UnusableError(Exception):
    """The file is damaged, or holds something else than is wanted; the message says what, without the path."""


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Packed(msgspec.Struct):
    shape: PackedShape
    checksum: str
    """Hexadecimal: not every reader of JSON has integers of 64 bits."""


class _Description(msgspec.Struct):
    identity: str
    """Of the weights before they were packed, and of how that was done."""
    weights: dict[str, _Packed]


def write_entry(path: Path, identity: str, weights: Mapping[str, PackedWeight]) -> None:
    """Write `weights` to the new file `path`; raises OSError."""
    packed = {name: _Packed(w.shape, f"{w.checksum():016x}") for name, w in weights.items()}
    description = msgspec.json.encode(_Description(identity, packed)).decode()
    header: dict[str, object] = {_METADATA: {"format": "pt", _OURS: description}}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.num_bytes
        header[name] = _Tensor("U8", [weight.num_bytes], (start, end))
    text = msgspec.json.encode(header)
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.writelines(weight.panels for weight in weights.values())


@dataclass(slots=True)
class Entry:
    """An open file; close it. Its name may be gone or taken by another meanwhile."""

    _fd: int
    _weights: dict[str, _Packed]
    _places: dict[str, tuple[int, int]]
    """Start and end in the file."""

    @classmethod
    def open(cls, path: Path, identity: str) -> Entry:
        """Raises OSError, and UnusableError when the file is damaged or belongs to another `identity`."""
        fd = os.open(path, os.O_RDONLY)
        try:
            return cls(fd, *_contents(fd, identity))
        except BaseException:
            os.close(fd)
            raise

    def read(self, name: str, shape: PackedShape) -> PackedWeight:
        """The weight `name`; raises OSError, and UnusableError when it is damaged, not there or of another shape."""
        described = self._weights.get(name)
        if described is None or described.shape != shape:
            raise UnusableError(f"{name} is not in it as {shape}")
        start, end = self._places[name]
        try:
            packed = cpu_ops.read_packed(self._fd, start, end - start, shape)
        except ValueError as error:
            raise UnusableError(f"{name}: {error}") from error
        if f"{packed.checksum():016x}" != described.checksum:
            raise UnusableError(f"{name} is damaged")
        return packed

    def close(self) -> None:
        os.close(self._fd)


def _contents(fd: int, identity: str) -> tuple[dict[str, _Packed], dict[str, tuple[int, int]]]:
    num_bytes = os.fstat(fd).st_size
    header_bytes = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    data = _LENGTH_BYTES + header_bytes
    if data > min(num_bytes, _MAX_HEADER_BYTES):
        raise UnusableError("its header is damaged or cut off")
    try:
        header = msgspec.json.decode(os.pread(fd, header_bytes, _LENGTH_BYTES), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop(_METADATA), type=dict[str, str])
        description = msgspec.json.decode(metadata[_OURS], type=_Description)
        offsets = {name: msgspec.json.decode(raw, type=_Tensor).data_offsets for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise UnusableError(f"its header is damaged ({type(error).__name__})") from error
    if description.identity != identity:
        raise UnusableError("it belongs to other weights")
    _check_places(offsets.values(), num_bytes - data)
    if offsets.keys() != description.weights.keys():
        raise UnusableError("its header contradicts itself")
    return description.weights, {name: (data + start, data + end) for name, (start, end) in offsets.items()}


def _check_places(offsets: Iterable[tuple[int, int]], data_bytes: int) -> None:
    end = 0
    for start, stop in sorted(offsets):
        if start != end or stop < start:
            raise UnusableError("its header contradicts itself")
        end = stop
    if end != data_bytes:
        raise UnusableError(f"it has {data_bytes} bytes of weights, not {end}")
