"""How an encoded prompt crosses a plain socket: arrays one after the other, in numpy's own format, never as pickle."""

from __future__ import annotations

from collections.abc import Sequence
from io import BufferedIOBase

import numpy as np
from numpy.lib import format as npy


def send(stream: BufferedIOBase, arrays: Sequence[np.ndarray]) -> None:
    """Write how many arrays there are, and each with its type and shape."""
    for array in (np.array(len(arrays)), *arrays):
        npy.write_array(stream, array, allow_pickle=False)
    stream.flush()


def receive(stream: BufferedIOBase) -> list[np.ndarray]:
    """Read what `send` wrote; a type that would need pickle is an error."""
    count = int(npy.read_array(stream, allow_pickle=False))
    return [npy.read_array(stream, allow_pickle=False) for _ in range(count)]
