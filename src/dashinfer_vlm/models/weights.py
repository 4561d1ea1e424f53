"""Safetensors checkpoints, read one tensor at a time: a model is never in memory twice.

Models ask for tensors by their first published names; those of other exports are translated as the family says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from dashinfer_vlm.config import EngineConfig
from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.layers.linear import Floats, Matrix, Nibbles
from dashinfer_vlm.layers.memory import huge_zeros
from dashinfer_vlm.layers.ranks import WHOLE, Cut
from dashinfer_vlm.models.config import CheckpointConfig
from dashinfer_vlm.models.entries import (
    FP8,
    INTEGERS,
    SIZES,
    Entry,
    digest_of,
    header_of,
    paths_in,
    read,
    read_base,
    read_whole,
)
from dashinfer_vlm.models.family import Names, Part
from dashinfer_vlm.models.fused_experts import unfused
from dashinfer_vlm.models.lora import paths_of_adapter, with_adapter
from dashinfer_vlm.models.packed import StoredIntegers
from dashinfer_vlm.models.settings import names_of, weight_type
from dashinfer_vlm.models.stored import Stored, StoredFloats

__all__ = ["Progress", "Weights"]

Progress = Callable[[int, int], None]
"""Called with the bytes that were taken so far and the bytes of the whole checkpoint."""


class Weights:
    """The tensors of a model folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Only headers are read at first. Each tensor is to be taken once; `finish()` then complains about those that nobody
    took. Every error is a CheckpointError that names the tensor or the file. `stored` is what `read_stored` found. The
    adapter in the folder `lora` is added to the matrices that are read, which then have the type `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        names: Names,
        stored: Stored | None,
        *,
        lora: str | None = None,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
    ) -> None:
        self.folder = folder
        self.names = names
        self.stored = stored
        self.dtype = dtype
        self._progress = progress
        self._entries: dict[str, Entry] = {}
        self.paths = paths_in(folder)
        for path in self.paths:
            self._add(path)
        self._entries = unfused(self._entries)
        if isinstance(stored, StoredFloats):
            self._entries = _with_scales(self._entries, stored)
        elif stored is not None:
            self._entries = _with_parts(self._entries, stored)
        self._check_types(stored)
        if lora:
            self._entries = with_adapter(self._entries, Path(lora), names)
            self.paths += paths_of_adapter(Path(lora))
        self._left = set(self._entries)
        self._bytes_done = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)  # new memory for each matrix costs more than joining it
        self.num_bytes = sum(entry.num_bytes for entry in self._entries.values())

    @classmethod
    def of(cls, checkpoint: CheckpointConfig, config: EngineConfig, *, progress: Progress | None = None) -> Weights:
        """Those of a checkpoint, with the adapter and in the type that `config` names."""
        names, dtype = names_of(checkpoint, config), getattr(torch, weight_type(checkpoint, config))
        return cls(checkpoint.folder, names, checkpoint.stored, lora=config.lora, dtype=dtype, progress=progress)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def num_adapted(self) -> int:
        """Matrices that an adapter adds to."""
        return sum(entry.update is not None for entry in self._entries.values())

    def shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Of all tensors of a part of the model, by name; none for a part that it does not have."""
        prefixes = self.names.parts.get(part, ())
        return {name: entry.shape for name, entry in self._entries.items() if name.startswith(prefixes)}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name`, which must have `shape`, in the file's dtype, or in float32 where an adapter adds to it.

        It may be a view of the mapped file, so copy what is kept: the mapping ends with the tensor.
        """
        return read(self._claim(name, shape))

    def look(self, name: str) -> torch.Tensor:
        """A tensor that another layer takes, in the file's dtype, or in floats; as `take` otherwise."""
        return read(self._entries[name])

    def join(self, names: tuple[str, ...], sizes: tuple[int, ...], cut: Cut = WHOLE) -> torch.Tensor:
        """Vectors `names` of `sizes` and one dtype, one after the other."""
        tensors = self._read_alike([self._claim(n, (size,)) for n, size in zip(names, sizes, strict=True)])
        parts = zip(tensors, cut.of(names), strict=True)
        return torch.cat([tensor[rows] for tensor, of_tensor in parts for rows in of_tensor])

    def matrix(self, rows: Mapping[str, int], depth: int, cut: Cut = WHOLE) -> Matrix:
        """Tensors of shapes `[rows[name], depth]` and one dtype, their part inside `cut` joined along the first axis
        when they are read.

        They are taken, and complained about, now.
        """
        claimed = [self._claim(name, (num_rows, depth)) for name, num_rows in rows.items()]
        found = [(entry, part) for entry, parts in zip(claimed, cut.of(rows), strict=True) for part in parts]
        entries, parts = [entry for entry, _ in found], [part for _, part in found]
        return Matrix(
            "+".join(rows),
            sum(len(range(entry.shape[0])[part]) for entry, part in found),
            len(range(depth)[cut.columns]),
            partial(self._join, entries, parts, cut.columns),
            read_floats=_floats(entries, parts, cut.columns),
            nibbles=_nibbles(entries, parts, cut.columns),
        )

    def fingerprint(self, part: Part) -> bytes:
        """SHA-256 over names, shapes, types and values of all tensors of a part of the model, which are read in several
        threads; takes none of them."""
        names = sorted(name for name in self._entries if name.startswith(self.names.parts[part]))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            digests = pool.map(digest_of, names, [self._entries[name] for name in names])
            return hashlib.sha256(b"".join(digests)).digest()

    def finish(self) -> None:
        """Raise CheckpointError when tensors are left over."""
        if left := [name for name in self._left if not self._is_nothing(name)]:
            names = sorted(left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{self.folder}: the model has no place for tensor {', '.join(names[:3])}{more}")

    def _is_nothing(self, name: str) -> bool:
        """GPTQ writes biases of zeros for layers that have none."""
        weight = self._entries.get(f"{name.removesuffix('.bias')}.weight")
        is_of_integers = weight is not None and isinstance(weight.stored, StoredIntegers)
        return name.endswith(".bias") and is_of_integers and not read(self._entries[name]).any()

    def _claim(self, name: str, shape: tuple[int, ...]) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.path}: tensor {name} has shape {list(entry.shape)}, not {list(shape)}")
        self._left.discard(name)
        self._bytes_done += entry.num_bytes
        if self._progress is not None:
            self._progress(self._bytes_done, self.num_bytes)
        return entry

    def _join(self, entries: list[Entry], parts: list[slice], columns: slice) -> torch.Tensor:
        """One matrix may be the file's memory; else they are joined in memory that the next call uses again."""
        tensors = [tensor[rows, columns] for tensor, rows in zip(self._read_alike(entries), parts, strict=True)]
        is_adapted = any(entry.update is not None for entry in entries)
        if len(entries) == 1 and not is_adapted:
            return tensors[0]
        dtype = self.dtype if is_adapted else tensors[0].dtype
        shape = (sum(len(tensor) for tensor in tensors), tensors[0].shape[1])
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if self._scratch.numel() < num_bytes:
            self._scratch = huge_zeros((num_bytes,), torch.uint8)
        joined = self._scratch[:num_bytes].view(dtype).view(shape)
        if not is_adapted:
            return torch.cat(tensors, out=joined)
        places = torch.split(joined, [len(tensor) for tensor in tensors])
        for entry, tensor, place, rows in zip(entries, tensors, places, parts, strict=True):
            if entry.update is None:
                place.copy_(tensor)
            else:
                entry.update.merge(tensor, place, rows, columns)
        return joined

    def _read_alike(self, entries: list[Entry]) -> list[torch.Tensor]:
        tensors = list(map(cache(read_base), entries))  # one of which many parts are wanted is read once
        if len({tensor.dtype for tensor in tensors}) > 1:
            names = ", ".join(self.names.ours(entry.name) for entry in entries)
            raise CheckpointError(f"{self.folder}: tensors {names} must have one dtype")
        return tensors

    def _add(self, path: Path) -> None:
        for entry in header_of(path):
            name = self.names.ours(entry.name)
            if name.endswith(".inv_freq"):
                continue  # old exports kept this table, which follows from the configuration
            if name.startswith(self.names.ignored):
                continue
            if name in self._entries:
                raise CheckpointError(f"{path}: tensor {name} is also in {self._entries[name].path.name}")
            self._entries[name] = entry

    def _check_types(self, stored: Stored | None) -> None:
        """What is left of 8-bit floats and of integers cannot be read."""
        for name, entry in self._entries.items():
            if entry.dtype in INTEGERS and not entry.parts:
                raise CheckpointError(f"{entry.path}: tensor {name} is {entry.dtype}; supported: {', '.join(SIZES)}")
            if entry.dtype == FP8 and entry.scale is None:
                reason = (
                    "config.json has no quantization_config" if stored is None else "the checkpoint has no scale for it"
                )
                raise CheckpointError(f"{entry.path}: tensor {name} is {FP8}, but {reason}")


def _floats(entries: list[Entry], parts: list[slice], columns: slice) -> Callable[[], Floats] | None:
    """Reads them joined as they are stored, where all are 8-bit floats that can be, and no adapter adds to them."""
    stored, scales = entries[0].stored, [entry.scale for entry in entries if entry.scale is not None]
    shapes = [entry.shape for entry in entries]
    if (
        not isinstance(stored, StoredFloats)
        or len(scales) < len(entries)
        or any(entry.update is not None for entry in entries)
        or not stored.can_be_joined(shapes, parts, columns)
    ):
        return None

    def read() -> Floats:
        numbers, joined, whole = [], [], cache(read_whole)
        for entry, scale, rows in zip(entries, scales, parts, strict=True):
            numbers.append(whole(entry)[rows, columns].view(torch.uint8))
            joined.append(stored.own_scales(whole(scale), entry.shape, rows, columns))
        return Floats(torch.cat(numbers).view(torch.float8_e4m3fn), torch.cat(joined), stored.block is not None)

    return read


def _nibbles(entries: list[Entry], parts: list[slice], columns: slice) -> Nibbles | None:
    """The same, where all are 4 bits in groups of columns that follow each other, and no adapter adds to them."""
    stored = entries[0].stored
    if not isinstance(stored, StoredIntegers) or any(
        entry.stored != stored or entry.update is not None or not _is_in_order(entry) for entry in set(entries)
    ):
        return None
    group, inside = stored.nibble_group, range(entries[0].shape[1])[columns]
    if not group or inside.start % group:
        return None
    groups = slice(inside.start // group, -(-inside.stop // group))

    def of(entry: Entry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        beside = {part: read_whole(other) for part, other in entry.parts.items()}
        return stored.nibbles(read_whole(entry), beside, entry.shape)

    def read() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        joined: tuple[list[torch.Tensor], ...] = [], [], []
        for found, rows in zip(map(cache(of), entries), parts, strict=True):
            for tensors, tensor, across in zip(joined, found, (columns, groups, groups), strict=True):
                if tensor is not None:
                    tensors.append(tensor[rows, across])
        numbers, scales, zeros = joined
        return torch.cat(numbers), torch.cat(scales), torch.cat(zeros) if zeros else None

    return Nibbles(group, stored.has_zeros, read)


def _is_in_order(entry: Entry) -> bool:
    """Whether groups of columns follow each other; GPTQ says of each column to which group it belongs."""
    assert isinstance(entry.stored, StoredIntegers)
    if "groups" not in entry.parts:
        return True
    columns = torch.arange(entry.shape[1])
    return torch.equal(read_whole(entry.parts["groups"]).long(), columns // (entry.stored.group or len(columns)))


def _with_scales(entries: dict[str, Entry], stored: StoredFloats) -> dict[str, Entry]:
    """Weights of 8-bit floats with the scales that lie beside them, which are no longer tensors of their own."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        base = name.removesuffix(".weight")
        scale = next((entries[base + suffix] for suffix in stored.scale_suffixes if base + suffix in entries), None)
        if entry.dtype == FP8 and scale is not None:
            if scale.shape not in stored.scale_shapes(entry.shape):
                wanted = " or ".join(str(list(shape)) for shape in stored.scale_shapes(entry.shape))
                raise CheckpointError(
                    f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, not {wanted}, for a weight of "
                    f"{list(entry.shape)}"
                )
            num_bytes = entry.num_bytes + scale.num_bytes
            found[name] = replace(entry, num_bytes=num_bytes, scale=scale, stored=stored)
        elif not name.endswith((*stored.scale_suffixes, *stored.ignored_suffixes)):
            found[name] = entry
    return found


def _with_parts(entries: dict[str, Entry], stored: StoredIntegers) -> dict[str, Entry]:
    """Weights of few bits under the name of the matrix, with what lies beside their numbers."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        base = name.removesuffix(stored.numbers_suffix)
        if name.endswith(stored.numbers_suffix) and entry.dtype in INTEGERS:
            _check_type(entry, stored.types("numbers"))
            if name != f"{base}.weight" and f"{base}.weight" in entries:
                raise CheckpointError(f"{entry.path}: tensor {name} is also stored whole, as {base}.weight")
            beside = {part: base + suffix for part, suffix in stored.part_suffixes.items()}
            if absent := [other for part, other in beside.items() if other not in entries and stored.is_needed(part)]:
                raise CheckpointError(f"{entry.path}: tensor {absent[0]} is missing")
            parts = {part: entries[other] for part, other in beside.items() if other in entries}
            for part, other in parts.items():
                _check_type(other, stored.types(part))
            told = _told_shape(parts["shape"]) if "shape" in parts else None
            try:
                shape = stored.shape(entry.shape, {part: other.shape for part, other in parts.items()}, told)
            except ValueError as error:
                raise CheckpointError(f"{entry.path}: tensor {name} {error}") from error
            num_bytes = entry.num_bytes + sum(part.num_bytes for part in parts.values())
            found[f"{base}.weight"] = replace(entry, shape=shape, num_bytes=num_bytes, parts=parts, stored=stored)
        elif not _belongs(name, entries, stored):
            found[name] = entry
    return found


def _check_type(entry: Entry, types: tuple[str, ...]) -> None:
    if entry.dtype not in types:
        raise CheckpointError(f"{entry.path}: tensor {entry.name} is {entry.dtype}, not {' or '.join(types)}")


def _told_shape(entry: Entry) -> tuple[int, ...]:
    if entry.shape != (2,):
        raise CheckpointError(f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, not [2]")
    return tuple(read_whole(entry).tolist())


def _belongs(name: str, entries: Mapping[str, Entry], stored: StoredIntegers) -> bool:
    """Whether this is a part of a weight of few bits, or says nothing about it."""
    for suffix in (*stored.part_suffixes.values(), *stored.ignored_suffixes):
        if name.endswith(suffix) and name.removesuffix(suffix) + stored.numbers_suffix in entries:
            return True
    return False
