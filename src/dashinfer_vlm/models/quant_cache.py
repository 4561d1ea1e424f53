"""Quantised weights that one start leaves on disk for the next.

`QuantStore` is what a model in the making asks (`layers.quantise.PackedStore` over a file), `QuantFolder` knows what
lies where and how much may, `Entry` is a file's format: safetensors, so that other tools can look at it, with one more
description in its metadata.

Files appear at once and whole, so any number of processes may read and write; of two that write the same, the later one
stays. What happens to a file later is found by its size and by a checksum per weight. Nothing here stops a start: what
cannot be read or written costs a line in the log, and the time to quantise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import torch

from dashinfer_vlm import envs
from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import ConfigError
from dashinfer_vlm.kernels import cpu_ops
from dashinfer_vlm.kernels.cpu_ops import PackedShape, PackedWeight
from dashinfer_vlm.layers.quantise import QUANT_TYPES
from dashinfer_vlm.models.family import Part
from dashinfer_vlm.models.weights import Weights

__all__ = ["Entry", "QuantFolder", "QuantStore", "UnusableError", "open_store", "write_entry"]

logger = logging.getLogger(__name__)

_GIB = 2**30
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


RESERVE_BYTES = 1 << 30
"""What is left free on the disk."""
UNFINISHED_S = 3600.0
"""Age at which a file that nobody finished is nobody's any more: its process was killed."""
RACY_NS = 2 * 10**9
"""A file that changed so recently may change again without getting another time stamp."""
MAX_SEEN = 256
"""Checkpoints whose identity is remembered."""


@dataclass(frozen=True, slots=True)
class QuantFolder:
    path: Path
    limit_bytes: int

    def open(self, name: str, identity: str) -> Entry | None:
        """The file `name` when it holds what `identity` says, marked as used now; else None."""
        path = self.path / name
        try:
            entry = Entry.open(path, identity)
        except FileNotFoundError:
            return None
        except (UnusableError, OSError) as error:
            logger.warning("quantised weights in %s cannot be used: %s; quantising again", path, error)
            return None
        with suppress(OSError):  # a read-only folder is useful too; age does not matter there
            os.utime(path)
        return entry

    def write(self, name: str, identity: str, weights: Mapping[str, PackedWeight]) -> bool:
        """Keep `weights` as `name`, after removing what was used least recently until there is room; says whether it
        is kept."""
        num_bytes = sum(weight.num_bytes for weight in weights.values())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / name).unlink(missing_ok=True)
            self._make_room(num_bytes)
            refused = self._refusal(num_bytes)
            if refused is None:
                self._put(name, lambda path: write_entry(path, identity, weights))
        except OSError as error:
            refused = str(error)
        if refused is not None:
            logger.warning("quantised weights are not kept: %s", refused)
            return False
        logger.info("kept %.2f GiB of quantised weights in %s", num_bytes / _GIB, self.path / name)
        return True

    def remembered(self, files: Sequence[Path], part: str, identify: Callable[[], bytes]) -> bytes:
        """`identify()` of what `files` contain: reading gigabytes takes seconds, so the answer is kept for as long as
        no file changes its place, size or times."""
        started = time.time_ns()
        stats = [(str(path.resolve()), path.stat()) for path in files]
        seen = [(p, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats]
        path = self.path / f"{hashlib.sha256(repr((part, seen)).encode()).hexdigest()}.seen"
        with suppress(OSError, ValueError):
            digest = bytes.fromhex(path.read_text(encoding="ascii"))
            if len(digest) == hashlib.sha256().digest_size:
                return digest
        identity = identify()
        if max(max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats) < started - RACY_NS:
            with suppress(OSError):  # `write` will say why nothing can be kept here
                self.path.mkdir(parents=True, exist_ok=True)
                self._put(path.name, lambda new: new.write_text(identity.hex(), encoding="ascii"))
        return identity

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        unfinished = self.path / f"{name}.{secrets.token_hex(4)}.unfinished"
        try:
            write(unfinished)
            unfinished.replace(self.path / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        for path, stat in _by_age(self.path.glob("*.unfinished")):
            if stat.st_mtime < time.time() - UNFINISHED_S:
                path.unlink(missing_ok=True)
        for path, _ in _by_age(self.path.glob("*.seen"))[:-MAX_SEEN]:
            path.unlink(missing_ok=True)
        entries = _by_age(self.path.glob("*.safetensors"))
        total = sum(stat.st_size for _, stat in entries)
        if num_bytes > self.limit_bytes:
            return  # it would not fit into an empty folder
        for path, stat in entries:
            if total + num_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
            logger.info("removed %s, which was used least recently, to make room", path)

    def _refusal(self, num_bytes: int) -> str | None:
        if num_bytes > self.limit_bytes:
            return (
                f"they take {num_bytes / _GIB:.2f} GiB, and --quant-cache-gib allows {self.limit_bytes / _GIB:g}; "
                "allow more, or 0 to stop trying"
            )
        free = shutil.disk_usage(self.path).free
        if free < num_bytes + RESERVE_BYTES:
            return f"they take {num_bytes / _GIB:.2f} GiB, and {self.path} has {free / _GIB:.2f} GiB free"
        return None


def _by_age(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """The least recently used first; files that another process removes meanwhile are left out."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return sorted(found, key=lambda item: item[1].st_mtime_ns)


class QuantStore:
    """The packed weights of one part of one checkpoint; a context in which all of them are asked for. When that went
    well, what was not found is written at its end."""

    def __init__(self, folder: QuantFolder, name: str, identity: str) -> None:
        self._folder = folder
        self._name = name
        self._identity = identity
        self._entry: Entry | None = folder.open(name, identity)
        self._weights: dict[str, PackedWeight] = {}
        self._is_new = False

    @property
    def path(self) -> Path:
        return self._folder.path / self._name

    @property
    def found(self) -> bool:
        """Whether there is a file that can be read."""
        return self._entry is not None

    def __enter__(self) -> QuantStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._is_new and error is None:
            self._folder.write(self._name, self._identity, self._weights)
        self._weights.clear()  # the layers have them

    def find(self, name: str, shape: PackedShape) -> PackedWeight | None:
        """The weight `name` as the file has it. Once something is wrong with the file, nothing more is taken from
        it."""
        if self._entry is None:
            return None
        try:
            packed = self._entry.read(name, shape)
        except (UnusableError, OSError) as error:
            logger.warning("quantised weights in %s cannot be used: %s; quantising again", self.path, error)
            self._close()
            return None
        self._weights[name] = packed
        return packed

    def keep(self, name: str, packed: PackedWeight) -> None:
        """Have it written at the end."""
        self._weights[name] = packed
        self._is_new = True

    def _close(self) -> None:
        if self._entry is not None:
            self._entry.close()
            self._entry = None


def open_store(
    config: EngineConfig, weights: Weights, part: Part, dtype: torch.dtype, device: torch.device
) -> QuantStore | nullcontext[None]:
    """The store for a part that `config` wants quantised; a context of None where it does not, or keeps nothing, and on
    a card, which quantises in seconds."""
    quant_type = config.quant_type if part == "text" else config.vision_quant_type
    if quant_type not in QUANT_TYPES or not config.quant_cache_gib:
        return nullcontext()
    if device.type != "cpu" or not cpu_ops.available():
        return nullcontext()
    try:
        path = Path(config.quant_cache).expanduser() if config.quant_cache else envs.cache_folder() / "quantised"
    except RuntimeError as error:  # no home
        logger.warning("quantised weights are not kept: %s; name a folder with --quant-cache", error)
        return nullcontext()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--quant-cache {path} is not a folder")
    folder = QuantFolder(path, int(config.quant_cache_gib * _GIB))
    # the same files, of which another configuration may read other tensors, or give them other numbers
    read = f"{part} of {weights.stored!r}, {weights.names.parts[part]}"
    source = folder.remembered(weights.paths, read, lambda: weights.fingerprint(part))
    how = json.dumps([quant_type, str(dtype), cpu_ops.packing()])
    identity = hashlib.sha256(source + how.encode()).hexdigest()
    return QuantStore(folder, f"{part}-{quant_type}-{identity[:24]}.safetensors", identity)
