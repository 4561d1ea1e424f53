"""Experts that lie in one tensor of three axes: how Qwen3-VL's mixtures are published, and what `transformers` writes.

Models ask for `experts.N.gate_proj.weight`, `up_proj` and `down_proj`, as Qwen3's are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dashinfer_vlm.errors import CheckpointError
from dashinfer_vlm.models.entries import Entry, Piece

__all__ = ["unfused"]

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def unfused(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same tensors, matrices of experts each by itself. Raises CheckpointError for shapes that fit no layout."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name.endswith(_GATE_UP):
            prefix = name.removesuffix(_GATE_UP)
            found.update(_matrices(prefix + ".experts", entry, entries.get(prefix + _DOWN)))
        elif not (name.endswith(_DOWN) and name.removesuffix(_DOWN) + _GATE_UP in entries):
            found[name] = entry
    return found


def _matrices(prefix: str, gate_up: Entry, down: Entry | None) -> Iterator[tuple[str, Entry]]:
    """[E, H, 2I] and [E, I, H] as published, or [E, 2I, H] and [E, H, I]; no sizes fit both."""
    if down is None:
        raise CheckpointError(f"{gate_up.path}: tensor {prefix}.down_proj is missing")
    if len(gate_up.shape) != 3 or len(down.shape) != 3 or gate_up.shape[0] != down.shape[0]:
        raise _misfit(gate_up, down)
    _, a, b = gate_up.shape
    _, c, d = down.shape
    if (a, b) == (d, 2 * c):
        is_transposed, inner = True, c
    elif (b, a) == (c, 2 * d):
        is_transposed, inner = False, d
    else:
        raise _misfit(gate_up, down)
    halves = slice(0, inner), slice(inner, 2 * inner)
    for i in range(gate_up.shape[0]):
        for kind, half in zip(("gate", "up"), halves, strict=True):
            piece = Piece(i, columns=half, is_transposed=True) if is_transposed else Piece(i, rows=half)
            yield f"{prefix}.{i}.{kind}_proj.weight", _cut(gate_up, piece, (inner, a if is_transposed else b))
        shape = (d, c) if is_transposed else (c, d)
        yield f"{prefix}.{i}.down_proj.weight", _cut(down, Piece(i, is_transposed=is_transposed), shape)


def _cut(whole: Entry, piece: Piece, shape: tuple[int, int]) -> Entry:
    num_bytes = whole.num_bytes // math.prod(whole.shape) * math.prod(shape)
    return replace(whole, piece=piece, shape=shape, num_bytes=num_bytes)


def _misfit(gate_up: Entry, down: Entry) -> CheckpointError:
    shapes = f"{list(gate_up.shape)}, and {down.name} {list(down.shape)}"
    return CheckpointError(f"{gate_up.path}: tensor {gate_up.name} has shape {shapes}, which are no experts'")
