"""Positions of M-RoPE: where each token of a prompt stands in time, height and width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dashinfer_vlm.request import Grid, Item

__all__ = ["mrope_positions", "part_grid"]


def mrope_positions(
    num_tokens: int, items: Sequence[Item], *, merge_size: int, tokens_per_second: float | None = None
) -> tuple[np.ndarray, int]:
    """int64 [3, num_tokens] positions of a prompt, and the offset from a later token's index to its position.

    Text advances all three axes by one. An item spans its merged grid from the position where it begins, and what
    follows begins one past the largest position used so far (Qwen2-VL, Wang et al. 2024). A video's frames are
    `seconds_per_grid * tokens_per_second` apart, rounded down (Qwen2.5-VL, Bai et al. 2025), or 1 where
    `tokens_per_second` is None. An item without a grid counts like text; one in
    several parts is several items, each with its own temporal steps.

    This is the published definition and that of `transformers` 4; version 5 lets the text after a video whose frames
    outnumber its rows and columns begin among the frames' positions.
    """
    pieces: list[np.ndarray] = []
    index = position = 0
    for item in items:
        if item.grid is None:
            continue
        pieces.append(_text(position, item.start - index))
        position += item.start - index
        step = 1.0
        if tokens_per_second is not None and item.kind == "video":
            step = tokens_per_second * item.seconds_per_grid
        piece = _grid(part_grid(item, merge_size), merge_size, step) + position
        assert piece.shape[1] == item.num_tokens, (item.grid, merge_size, item.num_tokens)
        pieces.append(piece)
        position = int(piece.max()) + 1
        index = item.end
    pieces.append(_text(position, num_tokens - index))
    return np.concatenate(pieces, axis=1), position - index


def part_grid(item: Item, merge_size: int) -> Grid:
    """The grid of those temporal steps of an item that its run of placeholders stands for."""
    assert item.grid is not None, item
    _, rows, columns = item.grid
    return item.num_tokens * merge_size**2 // (rows * columns), rows, columns


def _text(first: int, num_tokens: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + num_tokens, dtype=np.int64), (3, num_tokens))


def _grid(grid: Grid, merge_size: int, time_step: float) -> np.ndarray:
    frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    # float32, as the reference does it: a product just below a whole number is rounded up to it
    times = (np.arange(frames, dtype=np.float32) * np.float32(time_step)).astype(np.int64)
    axes = np.meshgrid(times, np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack(axes).reshape(3, -1)
