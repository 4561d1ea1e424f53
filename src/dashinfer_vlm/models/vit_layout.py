"""How a ViT's packed patches are laid out: where each stands, and who attends to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dashinfer_vlm.layers.memory import sent
from dashinfer_vlm.models.config import VisionConfig
from dashinfer_vlm.request import Grid

__all__ = ["Layout", "PatchLayout", "frame_starts", "frames_layout", "patch_positions", "windows_layout"]


@dataclass(frozen=True, slots=True)
class PatchLayout:
    """How packed patches are ordered and who attends to whom."""

    starts: tuple[torch.Tensor, ...]
    """One int32 [N + 1] of segment starts for each kind of attention that the blocks use."""
    pairs: tuple[int, ...]
    """Of query and key within all segments, for each kind: what attention costs, told without a look at the device."""
    order: torch.Tensor | None = None
    """int64 [P / merge ** 2]: which group of patches stands where; None keeps the items' order."""


Layout = Callable[[Sequence[Grid]], PatchLayout]
"""Order and segments of packed items."""


def patch_positions(grid: Grid, merge_size: int) -> torch.Tensor:
    """int64 [P, 2]: row and column of each patch, in the processor's order (merge groups of neighbours together)."""
    frames, rows, columns = grid
    axes = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    plane = torch.stack(axes, dim=-1).view(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
    return plane.transpose(1, 2).reshape(-1, 2).repeat(frames, 1)


def frame_starts(grids: Sequence[Grid], device: torch.device) -> torch.Tensor:
    """int32 [frames of all items + 1]: each frame attends to itself alone."""
    lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
    return sent(torch.tensor([0, *lengths]).cumsum(0).int(), device)


def frames_layout(device: torch.device) -> Layout:
    """Items in their order, each frame attending to itself."""
    return lambda grids: PatchLayout(starts=(frame_starts(grids, device),), pairs=(_frame_pairs(grids),))


def _frame_pairs(grids: Sequence[Grid]) -> int:
    return sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids)


def windows_layout(config: VisionConfig, window: int, device: torch.device) -> Layout:
    """Tokens of a window of `window` by `window` stand together, so that its attention is a segment like any other: the
    first kind of segment is the frame, the second the window."""

    def layout(grids: Sequence[Grid]) -> PatchLayout:
        m = config.merge_size
        windows = [_windows(frames, rows // m, columns // m, window) for frames, rows, columns in grids]
        sizes = [0, *(frames * rows * columns // m**2 for frames, rows, columns in grids)]
        firsts = torch.tensor(sizes).cumsum(0).tolist()
        order = torch.cat([item_order + first for (item_order, _), first in zip(windows, firsts, strict=False)])
        lengths = torch.cat([torch.zeros(1, dtype=torch.int64), *(lengths for _, lengths in windows)]) * m**2
        starts = (frame_starts(grids, device), sent(lengths.cumsum(0).int(), device))
        pairs = (_frame_pairs(grids), int(lengths.square().sum()))
        return PatchLayout(starts=starts, pairs=pairs, order=sent(order, device))

    return layout


def _windows(frames: int, rows: int, columns: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For an item of merged tokens: their indices window by window (int64), and how many each window holds.

    Windows of `window` by `window` tokens tile each frame from its top left; those at the right and bottom edges hold
    what is left.
    """
    across = -(-columns // window)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    which = (row // window * across + column // window).flatten()
    order, lengths = which.argsort(stable=True), which.bincount()
    firsts = torch.arange(frames)[:, None] * (rows * columns)
    return (firsts + order).flatten(), lengths.repeat(frames)
