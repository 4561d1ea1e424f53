"""Ready-made embeddings of images, as safetensors files: looked at before anything is made of them."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from dashinfer_vlm.errors import MediaError
from dashinfer_vlm.request import Grid

__all__ = ["embedding_hash", "read_embedding"]

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "<u1"}
_MOST_PATCHES = 2**31 - 1


def read_embedding(embeds: bytes, grid_thw: bytes, *, merge_size: int) -> tuple[NDArray[np.float32], Grid]:
    """The rows float32 [tokens, width] of `embeds` and the grid of `grid_thw`, each a safetensors file of one tensor.

    `embeds`: float64, float32, float16 or bfloat16 [tokens, width], all finite in float32; `grid_thw`: integers [3],
    frames, rows and columns in patches, `merge_size` x `merge_size` of which are a token. Either may have further axes
    of length 1 in front. Raises MediaError for anything else.
    """
    shape, dtype, data = _only_tensor(embeds, "image_embeds", 2)
    if len(shape) != 2 or 0 in shape:
        raise MediaError(f"image_embeds has shape {list(shape)}; it must be [tokens, width]")
    rows = _as_float32(data, dtype).reshape(shape)
    if not np.isfinite(rows).all():
        raise MediaError("image_embeds has values that are not finite")
    grid = _read_grid(grid_thw)
    t, h, w = grid
    if h % merge_size or w % merge_size or t * h * w != len(rows) * merge_size**2:
        raise MediaError(
            f"image_grid_thw is {t}x{h}x{w}; with {merge_size}x{merge_size} patches a token that is not the "
            f"{len(rows)} rows of image_embeds"
        )
    return rows, grid


def embedding_hash(rows: NDArray[np.float32]) -> bytes:
    """32 bytes: the identity of the values and their shape."""
    digest = blake2b(repr(rows.shape).encode(), digest_size=32, person=b"embedding")
    digest.update(np.ascontiguousarray(rows).data)
    return digest.digest()


def _only_tensor(file: bytes, name: str, num_axes: int) -> tuple[tuple[int, ...], str, bytes]:
    """Shape without leading ones beyond `num_axes`, type and bytes of the one tensor in `file`."""
    try:
        found = deserialize(file)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise MediaError(f"{name} is not a safetensors file: {error}") from error
    if len(found) != 1:
        raise MediaError(f"{name} is a safetensors file of {len(found)} tensors; it must hold one")
    tensor = found[0][1]
    shape = list(tensor["shape"])
    while len(shape) > num_axes and shape[0] == 1:
        del shape[0]
    return tuple(shape), tensor["dtype"], bytes(tensor["data"])


def _as_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in _FLOATS:
        raise MediaError(f"image_embeds is {dtype}; it must be one of {', '.join(_FLOATS)} and BF16")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
        return np.frombuffer(data, _FLOATS[dtype]).astype(np.float32)


def _read_grid(file: bytes) -> Grid:
    shape, dtype, data = _only_tensor(file, "image_grid_thw", 1)
    if shape != (3,) or dtype not in _INTEGERS:
        raise MediaError(f"image_grid_thw is {dtype} {list(shape)}; it must be three integers: frames, rows, columns")
    t, h, w = np.frombuffer(data, _INTEGERS[dtype]).tolist()
    if min(t, h, w) < 1 or t * h * w > _MOST_PATCHES:
        raise MediaError(f"image_grid_thw is {t}x{h}x{w}; it must be three numbers from 1 on")
    return t, h, w
