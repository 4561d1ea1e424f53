"""Tensors of safetensors files, as their headers tell of them; the numbers are read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.kernels.threads import in_torch_threads
from dashinfer_vlm.models.packed import StoredIntegers
from dashinfer_vlm.models.stored import Stored

__all__ = [
    "FP8",
    "INTEGERS",
    "SIZES",
    "Entry",
    "LowRank",
    "Piece",
    "digest_of",
    "header_of",
    "paths_in",
    "read",
    "read_base",
    "read_whole",
]

FP8 = "F8_E4M3"
SIZES = {"BF16": 2, "F16": 2, "F32": 4, FP8: 1}
"""Bytes of one number of each type that is read."""
INTEGERS = {"I8": 1, "I32": 4, "I64": 8}
"""The same of parts of matrices that are stored quantised."""
_MERGED_AT_ONCE = 1 << 18
"""Numbers of float32 that stay in a core's cache until they are rounded."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of three axes holds a matrix."""

    index: int
    """Along the first axis."""
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    is_transposed: bool = False

    def of(self, tensor: Any) -> torch.Tensor:
        """Of what `safe_open` gives to cut pieces from."""
        matrix: torch.Tensor = tensor[self.index : self.index + 1, self.rows, self.columns][0]
        return matrix.t() if self.is_transposed else matrix


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Equal to itself alone, so that what was read of it can be looked up."""

    path: Path
    name: str
    """As the file calls it."""
    shape: tuple[int, ...]
    num_bytes: int
    dtype: str
    """As safetensors writes it."""
    piece: Piece | None = None
    """The part of the file's tensor that this is; None: all of it."""
    scale: Entry | None = None
    """What a weight of 8-bit floats is multiplied with."""
    stored: Stored | None = None
    """How it is stored, with `scale` or `parts` only."""
    parts: Mapping[str, Entry] = field(default_factory=dict)
    """What lies beside a weight of few bits, whose shape is that of the matrix."""
    update: LowRank | None = None
    """What an adapter adds to it."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * B A, of a matrix [N, K] or of a convolution's weight, flattened behind its first axis."""

    a: Entry
    """[r, K], or a tensor in which `a_rows` are."""
    b: Entry
    """[N, r], or a tensor in which `b_rows` and `b_columns` are."""
    scale: float
    a_rows: slice = field(default_factory=lambda: slice(None))
    b_rows: slice = field(default_factory=lambda: slice(None))
    b_columns: slice = field(default_factory=lambda: slice(None))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A, float32 [N, r] and [r, K]. Raises CheckpointError for numbers that are none."""
        b = read_whole(self.b).flatten(1)[self.b_rows, self.b_columns].float()
        a = read_whole(self.a).flatten(1)[self.a_rows].float()
        for entry, factor in ((self.b, b), (self.a, a)):
            if not np.isfinite(factor.numpy()).all():
                raise CheckpointError(f"{entry.path}: tensor {entry.name} holds numbers that are not finite")
        return b, a

    def merge(
        self, base: torch.Tensor, out: torch.Tensor, rows: slice = slice(None), columns: slice = slice(None)
    ) -> None:
        """Write the sum of `base` [n, k] and of this, its own `rows` and `columns`, to `out`, computed in float32 and
        rounded once. Raises CheckpointError for sums that `out` cannot hold."""
        b, a = self.factors()
        b, a = b[rows], a[:, columns]
        step = max(1, _MERGED_AT_ONCE // base.shape[1])

        def merge_from(row: int) -> None:
            part = slice(row, row + step)
            out[part] = torch.addmm(base[part].float(), b[part], a, alpha=self.scale)
            if not math.isfinite(out[part].sum(dtype=torch.float64)):
                kind = str(out.dtype).removeprefix("torch.")
                raise CheckpointError(f"{self.b.path}: tensor {self.b.name} adds numbers beyond what {kind} holds")

        in_torch_threads(merge_from, range(0, len(base), step))


def paths_in(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        if not path.exists():
            raise CheckpointError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
        return [path]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file name")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing; {index.name} names it")
    return [folder / name for name in sorted(names)]


def header_of(path: Path) -> list[Entry]:
    """All tensors of a file. Raises CheckpointError."""
    entries = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is not a mapping
                piece = file.get_slice(name)
                dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
                size = (SIZES | INTEGERS).get(dtype)
                if size is None:
                    raise CheckpointError(f"{path}: tensor {name} is {dtype}; supported: {', '.join(SIZES)}")
                num_bytes = size * torch.Size(shape).numel()
                entries.append(Entry(path, name, shape, num_bytes, dtype))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error
    return entries


def read(entry: Entry) -> torch.Tensor:
    """In floats, whatever it is stored as; in float32 where an adapter adds to it."""
    base = read_base(entry)
    if entry.update is None:
        return base
    merged = torch.empty(base.shape)
    entry.update.merge(base.flatten(1), merged.flatten(1))
    return merged


def read_base(entry: Entry) -> torch.Tensor:
    """In floats, without what an adapter adds."""
    if isinstance(entry.stored, StoredIntegers):
        parts = {part: read_whole(other) for part, other in entry.parts.items()}
        try:
            return entry.stored.restore(read_whole(entry), parts, entry.shape)
        except ValueError as error:
            raise CheckpointError(f"{entry.path}: tensor {entry.name} {error}") from error
    if entry.scale is not None and entry.stored is not None:
        return entry.stored.restore(read_whole(entry), read_whole(entry.scale))
    return read_whole(entry)


def read_whole(entry: Entry) -> torch.Tensor:
    """As it is stored, without what lies beside it."""
    # a handle per tensor: pages of the file count as ours until its mapping goes, with the last of its tensors
    try:
        with safe_open(entry.path, framework="pt") as file:
            if entry.piece is not None:
                return entry.piece.of(file.get_slice(entry.name))
            tensor: torch.Tensor = file.get_tensor(entry.name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{entry.path}: tensor {entry.name} cannot be read: {error}") from error


def digest_of(name: str, entry: Entry) -> bytes:
    """SHA-256 over name, shape, type and values, and over what an adapter adds to them."""
    tensor = read_base(entry)
    digest = hashlib.sha256(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(_bytes_of(tensor))
    if entry.update is not None:
        b, a = entry.update.factors()
        digest.update(f"{list(b.shape)} {list(a.shape)} {entry.update.scale!r}\n".encode())
        for factor in (b, a):
            digest.update(_bytes_of(factor))
    return digest.digest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
